"""What a record says of the changes of its run: which hold, since when, and where the run is."""

import hashlib
import json
from dataclasses import replace

import pytest

from minimind_data.dataset.format import TokenizerInfo
from minimind_data.errors import UserError
from minimind_train.run_folder import record as runs
from minimind_train.run_folder.record import MOVE, WEIGHTS, Change, RunRecord, move
from tests.helpers.datasets import BOS, EOS, PAD, byte_tokenizer
from tests.helpers.mutations import snapshot

TOKENIZER = TokenizerInfo(sha256="0" * 64, vocab_size=40, bos_id=BOS, eos_id=EOS, pad_id=PAD)


def record_of(*changes, **fields):
    return RunRecord(
        command="pretrain",
        options={"steps": 12},
        dataset="abc",
        tokenizer=TOKENIZER,
        changes=changes,
        **fields,
    )


def change(step, name="steps", position=None):
    return Change(step=step, name=name, old=1, new=2, position=position)


def test_a_record_comes_back_from_its_file(tmp_path):
    record = record_of(
        change(3, position=24), move(5, 40, 80), validation="def", relative_paths={"/a": "../a"}, finished=12
    )
    record.write(tmp_path)
    found = RunRecord.read(tmp_path)
    assert found == record
    assert [each.position for each in found.changes] == [24, None]
    assert json.loads((tmp_path / "config.json").read_bytes())["format_version"] == 2
    assert RunRecord.read(tmp_path).changed([change(7)]).changes == (*record.changes, change(7))


def test_going_back_undoes_the_moves_after_it_and_nothing_else():
    moves = [move(step, 8 * step, 8 * step + 100) for step in (4, 6, 8)]
    others = [change(step) for step in (4, 6, 8)]
    record = record_of(*(each for pair in zip(moves, others, strict=True) for each in pair))
    for step, kept in ((3, []), (4, moves[:1]), (5, moves[:1]), (6, moves[:2]), (8, moves), (9, moves)):
        found = record.without_moves_after(step).changes
        assert [each for each in found if each.name == MOVE] == kept
        assert [each for each in found if each.name != MOVE] == others


def test_a_checkpoint_resumes_at_its_position_or_where_it_was_last_moved_to():
    record = record_of(move(4, 32, 100), change(6), move(6, 48, 10), move(6, 10, 70))
    assert [record.position_at(step, 8 * step) for step in (3, 4, 5, 6, 7)] == [24, 100, 40, 70, 56]


def test_what_takes_effect_here_is_dated_here():
    old, undated, here, later = (
        change(3, position=24),
        change(6),
        change(6, position=50),
        change(9, position=72),
    )
    found = record_of(old, undated, here, later, change(9), change(5)).dated(6, 48).changes
    # The first was there before; the second and the last but one are dated now; those after the step wait no longer.
    assert [(each.step, each.position) for each in found] == [
        (3, 24), (6, 48), (6, 50), (6, 48), (6, 48), (5, None),
    ]  # fmt: skip
    assert [(each.name, each.old, each.new) for each in found] == [("steps", 1, 2)] * 6


def test_weights_of_a_mixture_stay_at_their_position():
    found = record_of(change(9, WEIGHTS, position=72), change(9, WEIGHTS)).dated(6, 48).changes
    assert [(each.step, each.position) for each in found] == [(9, 72), (6, 48)]


def test_positions_are_skipped_as_the_last_change_before_them_says():
    record = record_of(
        Change(step=4, name="skip_positions", old=["5:7"], new=["5:7", "40:60"], position=32),
        change(5, position=40),
        Change(step=6, name="skip_positions", old=["5:7", "40:60"], new=["5:7", "40:90"], position=66),
    )
    assert [record.skip_positions_at(position) for position in (0, 31, 32, 65, 66, 1000)] == [
        ("5:7",), ("5:7",), ("5:7", "40:60"), ("5:7", "40:60"), ("5:7", "40:90"), ("5:7", "40:90"),
    ]  # fmt: skip
    of_old = record_of(Change(step=4, name="skip_positions", old=[], new=["1:2"]))  # where is not recorded
    assert of_old.skip_positions_at(0) == ("1:2",)
    never = RunRecord(
        command="pretrain", options={"skip_positions": ["1:2"]}, dataset="", tokenizer=TOKENIZER
    )
    assert never.skip_positions_at(0) == ("1:2",)
    assert record_of().skip_positions_at(0) == ()


def test_the_end_is_noted_once(tmp_path):
    record_of().write(tmp_path)
    runs.refuse_repetition(tmp_path, RunRecord.read(tmp_path))
    runs.note_finish(tmp_path, 12)
    assert RunRecord.read(tmp_path) == record_of(finished=12)
    before = (tmp_path / "config.json").stat()
    runs.note_finish(tmp_path, 12)
    after = (tmp_path / "config.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    with pytest.raises(UserError, match="finished at step 12, and its checkpoints are gone"):
        runs.refuse_repetition(tmp_path, RunRecord.read(tmp_path))


def make_dataset(folder, tokenizer, config=None):
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer)
    if config:
        (folder / "tokenizer_config.json").write_text(config)
    return folder


def test_a_new_run_has_its_record_its_description_and_the_tokenizer(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name in ("config.json.1.partial", "checkpoints/step-000000004.1.partial", "mine.1.partial"):
        (run / name).touch()
    runs.create(run, record_of(), make_dataset(tmp_path / "data", "a tokenizer", "a template"), "steps = 12")
    assert {
        path.name: path.read_text() for path in run.iterdir() if path.suffix != ".partial" and path.is_file()
    } == {
        "config.json": (run / "config.json").read_text(),
        "run.toml": "steps = 12",
        "tokenizer.json": "a tokenizer",
        "tokenizer_config.json": "a template",
    }
    assert RunRecord.read(run) == record_of()
    assert [path.name for path in run.rglob("*.partial")] == ["mine.1.partial"], "the user's"
    plain = tmp_path / "plain"
    plain.mkdir()
    runs.create(plain, record_of(), make_dataset(tmp_path / "other", "a tokenizer"), "")
    assert not (plain / "tokenizer_config.json").exists()


def test_an_update_writes_what_is_new_or_gone(tmp_path):
    run, dataset = tmp_path / "run", make_dataset(tmp_path / "data", "a tokenizer")
    run.mkdir()
    info = replace(TOKENIZER, sha256=hashlib.sha256(b"a tokenizer").hexdigest())
    old = replace(record_of(), tokenizer=info)
    runs.create(run, old, dataset, "old")

    def written(new, description):
        before = {path.name: path.stat().st_ino for path in run.iterdir()}
        runs.update(run, old, new, dataset, description)
        after = {path.name: path.stat().st_ino for path in run.iterdir()}
        return {name for name in after if after[name] != before.get(name)}

    assert written(old, "not asked for") == set()
    assert written(old.changed([change(3)]), "new") == {"config.json", "run.toml"}
    assert (run / "run.toml").read_text() == "new"
    (run / "run.toml").unlink()
    assert written(old, "again") == {"run.toml"}
    (run / "tokenizer.json").write_text("another one")
    assert written(old, "") == {"tokenizer.json"}
    (run / "tokenizer.json").unlink()
    assert written(old, "") == {"tokenizer.json"}


@pytest.mark.parametrize("name", ["run.toml", "tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_a_run_replaces_no_file_of_anybodys(tmp_path, name, kind):
    run, dataset = tmp_path / "run", make_dataset(tmp_path / "data", "a tokenizer", "a template")
    run.mkdir()
    if kind == "file":
        (run / name).write_text("somebody's")
    elif kind == "link":
        (run / name).symlink_to("nowhere")
    else:
        (run / name).mkdir()
    before = snapshot(run)
    with pytest.raises(UserError, match=f"{name}: a .*`run`"):
        runs.create(run, record_of(), dataset, "steps = 12")
    assert snapshot(run) == before


def test_a_begin_that_was_killed_is_begun_again(tmp_path):
    run, dataset = tmp_path / "run", make_dataset(tmp_path / "data", "a tokenizer", "a template")
    run.mkdir()
    runs.create(run, record_of(), dataset, "steps = 12")
    (run / "config.json").unlink()  # which is written last
    runs.refuse_occupied(run)
    runs.create(run, record_of(), dataset, "steps = 12")
    assert RunRecord.read(run) == record_of()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model-00001-of-00002.bin", "pretrain_512.pth"]
)
def test_the_folder_of_a_model_takes_no_run(tmp_path, name):
    (tmp_path / name).touch()
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(UserError, match="the folder of a model, .*`run`"):
        runs.refuse_occupied(tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", ""])
def test_a_link_that_leads_nowhere_is_no_place_for_a_run(tmp_path, name):
    run = tmp_path / "run"
    if name:
        run.mkdir()
    (run / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=str(run)):
        runs.refuse_occupied(run)


def test_the_tokenizer_of_a_run_is_its_own(tmp_path):
    text = byte_tokenizer().to_str()
    info = replace(TOKENIZER, sha256=hashlib.sha256(text.encode()).hexdigest(), vocab_size=259)
    with pytest.raises(UserError, match="tokenizer.json: missing, or not the tokenizer"):
        runs.load_run_tokenizer(tmp_path, info)
    (tmp_path / "tokenizer.json").write_text(text)
    assert runs.load_run_tokenizer(tmp_path, info).decode([*range(3, 259)])
    with pytest.raises(UserError, match="tokenizer.json: missing, or not the tokenizer"):
        runs.load_run_tokenizer(tmp_path, replace(info, sha256="0" * 64))
