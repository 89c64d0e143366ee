"""A state.json can say anything, and anything can lie beside a checkpoint's files: what is loaded is what was saved, or nothing is."""

import json

import pytest
import torch
from safetensors.torch import save_file

from minimind_data.errors import UserError
from minimind_train.run_folder import checkpoint
from minimind_train.run_folder.tensors import tensors_of
from tests.helpers.checkpoints import bits, make, state
from tests.helpers.mutations import mutations, write_with_checksum


@pytest.fixture
def folder(tmp_path, trained):
    return checkpoint.save(tmp_path, state(3), tensors_of(*trained))


def content_of(folder):
    content = json.loads((folder / "state.json").read_bytes())
    del content["sha256"]
    return content


def refusal_of(run):
    try:
        checkpoint.load(run, 3)
    except UserError as error:
        return str(error)
    return None


def test_every_value_is_taken_or_refused_in_one_sentence(tmp_path, folder):
    refused = 0
    for change, changed in mutations(content_of(folder)):
        write_with_checksum(folder / "state.json", changed, "sha256")
        sentence = refusal_of(tmp_path)
        assert sentence is None or ("\n" not in sentence and "checkpoint" in sentence), change
        refused += sentence is not None
    assert refused > 200


@pytest.mark.parametrize("kind", ["model", "optimizer"])
@pytest.mark.parametrize("suffix", ["-00001-of-00002", "-00002-of-00002", "-x-of-y", "-9-of-9"])
def test_a_file_beside_a_checkpoint_is_no_part_of_it(tmp_path, folder, trained, kind, suffix):
    key = "" if kind == "model" else "exp_avg."
    name = f"{key}model.norm.weight"
    save_file(
        {name: torch.full((16,), 9.0), "another": torch.zeros(3)}, folder / f"{kind}{suffix}.safetensors"
    )
    restored = make(seed=1)
    checkpoint.load(tmp_path, 3).restore(*restored)
    assert bits(*restored) == bits(*trained)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_list_without_the_weights_or_the_optimizer_is_damaged(tmp_path, folder, name):
    content = content_of(folder)
    del content["files"][name]
    write_with_checksum(folder / "state.json", content, "sha256")
    assert f"lists no {name}" in refusal_of(tmp_path)


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(tmp_path, folder):
    folder.rename(checkpoint.folder_of(tmp_path, 5))
    with pytest.raises(UserError, match="state.json is of step 3"):
        checkpoint.load(tmp_path, 5)


@pytest.mark.parametrize("version", [1, 3, "2"])
def test_a_checkpoint_of_another_format_is_refused_and_none_before_it_is_taken(
    tmp_path, folder, trained, version
):
    checkpoint.save(tmp_path, state(2), tensors_of(*trained))
    content = content_of(folder)
    assert content["format_version"] == 2
    write_with_checksum(folder / "state.json", content | {"format_version": version}, "sha256")
    with pytest.raises(
        UserError, match=f"step-000000003 is of format {version!r}; this program reads format 2"
    ) as error:
        checkpoint.load_latest(tmp_path, pytest.fail)
    assert not isinstance(error.value, checkpoint.DamagedCheckpointError)
    del content["format_version"]
    write_with_checksum(folder / "state.json", content, "sha256")
    assert checkpoint.load_latest(tmp_path, pytest.fail).state == state(3)
