"""A checkpoint comes back bit for bit, is whole or absent, and says what is wrong with it when it is damaged."""

import json
import resource
import shutil

import pytest
import torch
from safetensors import SafetensorError, safe_open

from minimind_data.errors import UserError
from minimind_data.files import checksum_of_json
from minimind_train.model.config import ModelConfig
from minimind_train.run_folder import checkpoint
from minimind_train.run_folder.saver import Retention
from minimind_train.run_folder.tensors import tensors_of
from tests.helpers.checkpoints import bits, make, state, train


def save(run, state, model, optimizer, keep=3):
    folder = checkpoint.save(run, state, tensors_of(model, optimizer))
    Retention(newest=keep).apply(run, newest=state.step)
    return folder


@pytest.fixture
def run(tmp_path, trained):
    """A run folder with whole checkpoints of steps 1, 2 and 3."""
    for step in (1, 2, 3):
        save(tmp_path, state(step), *trained)
    return tmp_path


def fail(sentence):
    pytest.fail(f"nothing is damaged, yet: {sentence}")


def test_what_is_restored_is_what_was_saved_bit_for_bit(tmp_path, trained):
    save(tmp_path, state(3), *trained)
    found = checkpoint.load_latest(tmp_path, fail)
    other = make(seed=1)
    found.restore(*other)
    assert found.state == state(3)
    assert bits(*other) == bits(*trained)
    train(*trained, range(3, 6))
    train(*other, range(3, 6))
    assert bits(*other) == bits(*trained)


def test_a_checkpoint_is_three_plain_files_with_the_names_that_others_know(tmp_path, trained):
    folder = save(tmp_path, state(1000), *trained)
    assert folder == tmp_path / "checkpoints" / "step-000001000"
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    }
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.float32}
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names, "a tied weight is stored once"
    with safe_open(folder / "optimizer.safetensors", "pt") as file:
        assert set(file.keys()) == {
            f"{key}.{name}" for name in names for key in ("exp_avg", "exp_avg_sq", "step")
        }


def test_an_untied_head_and_an_optimizer_without_state_are_saved_too(tmp_path):
    config = ModelConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=40,
        tie_word_embeddings=False,
    )  # fmt: skip
    model, optimizer = make(config=config)
    save(tmp_path, state(0), model, optimizer)
    other = make(seed=1, config=config)
    checkpoint.load_latest(tmp_path, fail).restore(*other)
    assert bits(*other) == bits(model, optimizer)


def truncate(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


def flip(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[-10] ^= 1
    (folder / name).write_bytes(data)


def remove(folder, name):
    (folder / name).unlink()


@pytest.mark.parametrize("damage", [truncate, flip, remove])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(run, damage, name):
    damage(run / "checkpoints" / "step-000000003", name)
    told = []
    found = checkpoint.load_latest(run, told.append)
    assert found.state == state(2)
    assert len(told) == 1
    assert "step-000000003" in told[0]
    assert name in told[0]


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"sha256": 1}', "\udcff", "[" * 10**5, "9" * 5000])
def test_any_nonsense_in_state_json_is_damage(run, text):
    path = run / "checkpoints" / "step-000000003" / "state.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert checkpoint.load_latest(run, lambda _: None).state == state(2)


def test_an_edited_state_is_damage(run):
    path = run / "checkpoints" / "step-000000003" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cursor": 0}))
    told = []
    assert checkpoint.load_latest(run, told.append).state == state(2)
    assert "checksum" in told[0]


def test_when_all_are_damaged_nothing_is_guessed(run):
    for step in (1, 2, 3):
        truncate(checkpoint.folder_of(run, step), "model.safetensors")
    told = []
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoint.load_latest(run, told.append)
    assert len(told) == 3


def test_no_checkpoint_is_no_error(tmp_path):
    assert checkpoint.load_latest(tmp_path, fail) is None
    (tmp_path / "checkpoints").mkdir()
    assert checkpoint.load_latest(tmp_path, fail) is None


def test_one_step_can_be_asked_for(run):
    assert checkpoint.load(run, 2).state == state(2)
    with pytest.raises(UserError, match=r"no checkpoint of step 7; there are: 1, 2, 3"):
        checkpoint.load(run, 7)


def test_a_damaged_newer_one_takes_nobodys_place_and_is_replaced(run, trained):
    truncate(checkpoint.folder_of(run, 3), "model.safetensors")
    save(run, state(2), *trained, keep=1)
    assert checkpoint.load_latest(run, lambda _: None).state == state(2)
    save(run, state(3), *trained, keep=1)
    assert checkpoint.load_latest(run, fail).state == state(3)
    assert checkpoint.steps_of(run) == [3]


def test_a_state_without_what_was_told_later_is_read_and_what_comes_later_is_left_alone(run):
    path = run / "checkpoints" / "step-000000003" / "state.json"
    told = json.loads(path.read_text())
    for name in ("sha256", "skipped_steps", "val_loss", "val_on"):
        del told[name]
    told["invented_later"] = 1
    path.write_text(json.dumps({**told, "sha256": checksum_of_json(told)}))
    assert checkpoint.load_latest(run, fail).state == state(3)


def test_what_a_killed_save_left_is_no_checkpoint_and_goes_with_the_next_save(run, trained):
    left = run / "checkpoints" / "step-000000004.123.partial"
    shutil.copytree(checkpoint.folder_of(run, 3), left)
    assert checkpoint.load_latest(run, fail).state == state(3)
    save(run, state(4), *trained, keep=0)
    assert not left.exists()


@pytest.mark.parametrize("limit_bytes", [100, 20_000, 100_000])
def test_a_disk_that_fills_up_costs_only_the_checkpoint_that_was_being_written(run, trained, limit_bytes):
    model_bytes = (checkpoint.folder_of(run, 3) / "model.safetensors").stat().st_size
    optimizer_bytes = (checkpoint.folder_of(run, 3) / "optimizer.safetensors").stat().st_size
    limit_bytes = min(limit_bytes, optimizer_bytes - 1)
    assert 20_000 < model_bytes < limit_bytes or limit_bytes <= 20_000, (
        "one limit lets the first file through"
    )
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, former[1]))
    try:
        with pytest.raises(UserError, match="step-000000004: the checkpoint could not be written"):
            save(run, state(4), *trained)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        f"step-00000000{step}" for step in (1, 2, 3)
    ]
    assert checkpoint.load_latest(run, fail).state == state(3)


def test_a_full_disk_is_called_that(run, trained, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"No space left on device.*make room"):
        save(run, state(4), *trained)


def test_a_model_of_another_shape_is_refused_by_name(run):
    wider = ModelConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=40
    )
    with pytest.raises(
        UserError, match=r"another model: model\.embed_tokens\.weight is \[40, 16\] .* \[40, 32\]"
    ):
        checkpoint.load(run, 3).restore(*make(config=wider))


def test_what_must_not_be_read_is_not_called_damaged(run, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "sha256_of", refuse)
    with pytest.raises(PermissionError):
        checkpoint.load_latest(run, fail)


def test_only_folders_with_the_name_of_a_step_are_checkpoints(run):
    (run / "checkpoints" / "step-000000009").touch()
    for name in ("step-12", "step-000000010.1.partial", "latest"):
        (run / "checkpoints" / name).mkdir()
    assert checkpoint.steps_of(run) == [1, 2, 3]


@pytest.mark.parametrize("gone", [True, False])
def test_a_checkpoint_that_is_deleted_while_it_is_read_is_not_damaged(run, monkeypatch, gone):
    real, folder = checkpoint.sha256_of, checkpoint.folder_of(run, 3)

    def meanwhile(path):
        if path.parent == folder:
            shutil.rmtree(folder) if gone else path.unlink()
        return real(path)

    monkeypatch.setattr(checkpoint, "sha256_of", meanwhile)
    error = checkpoint.GoneCheckpointError if gone else checkpoint.DamagedCheckpointError
    with pytest.raises(error, match="step-000000003"):
        checkpoint.load(run, 3)


def test_a_checkpoint_that_is_deleted_before_it_is_restored(run):
    found = checkpoint.load(run, 3)
    for name in ("model.safetensors", "optimizer.safetensors"):
        (found.folder / name).unlink()
        with pytest.raises(FileNotFoundError):
            found.restore(*make())
        (found.folder / name).write_bytes((checkpoint.folder_of(run, 2) / name).read_bytes())
    (found.folder / "optimizer.safetensors").unlink()
    found.restore(make()[0])  # the optimizer is not asked for
    shutil.rmtree(found.folder)
    with pytest.raises(checkpoint.GoneCheckpointError, match="deleted while it was read"):
        found.restore(*make())


def test_a_full_disk_is_called_that_by_safetensors_too(run, trained, monkeypatch):
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"\(os error 28\)\); make room on the disk"):
        save(run, state(4), *trained)
