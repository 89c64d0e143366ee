"""The record of a run can say anything: the run is read, or one sentence names the file and the option; and so its checkpoints."""

import itertools
import json

import pytest

from minimind_data.errors import UserError
from minimind_train.run.entry import resume
from minimind_train.run.options import options_of
from minimind_train.run_folder import checkpoint
from minimind_train.run_folder.places import with_present_places
from minimind_train.run_folder.plot import read_curves
from minimind_train.run_folder.record import RunRecord
from minimind_train.weights.loading import model_of
from tests.helpers.commands import mm_train
from tests.helpers.mutations import mutations, write_with_checksum
from tests.helpers.runs import Said


def content_of(path):
    content = json.loads(path.read_bytes())
    del content["sha256"]
    return content


def refusal_of(read, *arguments, **options):
    try:
        read(*arguments, **options)
    except UserError as error:
        return str(error)
    except (
        OSError
    ) as error:  # of a path that no file can have; the command line says it as it says all of these
        return f"{error.filename}: {error.strerror}"
    return None


def read_options(run):
    return options_of(with_present_places(RunRecord.read(run), run, Said()), run)


def test_every_value_of_a_record_is_taken_or_refused_in_one_sentence(stopped_run):
    path = stopped_run / "config.json"
    refused = 0
    for change, changed in itertools.islice(mutations(content_of(path)), 0, None, 2):
        write_with_checksum(path, changed, "sha256")
        for read in (read_options, lambda run: read_curves([run])):
            sentence = refusal_of(read, stopped_run)
            assert sentence is None or ("\n" not in sentence), change
            refused += sentence is not None
    assert refused > 750


WRONG = {
    "micro_batch": "four",
    "seq_len": 16.5,
    "seed": -1,
    "learning_rate": [1],
    "shards": 7,
    "dropout": None,
    "val_shards": {"a": "b"},
    "layout": "row",
    "from_step": "worst",
    "from_weight": "a\0b",
    "skip_positions": ["3:1"],
    "mixture_stages": [{"start": "x", "shares": [1], "taken": [0]}],
    "nproc": "2",
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize(
    "arguments",
    [["pretrain", "--resume"], ["generate", "--prompt", "a"], ["export", "--to", "hf", "--out", "new"]],
    ids=lambda arguments: arguments[0],
)
def test_a_wrong_value_is_named_with_its_file(stopped_run, tmp_path, monkeypatch, name, arguments):
    """The model of a checkpoint is what its state.json says, so that is wrong too."""
    monkeypatch.chdir(tmp_path)
    state = checkpoint.folder_of(stopped_run, 6) / "state.json"
    for path, key in ((stopped_run / "config.json", "options"), (state, "config")):
        content = content_of(path)
        content[key][name] = WRONG[name]
        write_with_checksum(path, content, "sha256")
    result = mm_train(*arguments, "--run", stopped_run)
    if arguments[0] == "pretrain":
        assert result.exit_code == 1, result.output
        assert f"{stopped_run}/config.json: edited or damaged ({name}" in result.output.replace(
            "shards: ", ""
        )
    else:
        assert result.exit_code in (0, 1), result.output
        assert result.exit_code == 0 or f"({name} is " in result.output


def test_a_model_that_the_files_cannot_hold_is_not_built(stopped_run):
    """A record of a few bytes must not ask for terabytes."""
    state = checkpoint.folder_of(stopped_run, 6) / "state.json"
    for path, key in ((stopped_run / "config.json", "options"), (state, "config")):
        content = content_of(path)
        content[key] |= {"hidden_size": 2**20, "intermediate_size": 2**22, "head_dim": None}
        write_with_checksum(path, content, "sha256")
    for read in (lambda: model_of(stopped_run, step=6, say=Said()), lambda: resume(stopped_run, say=Said())):
        with pytest.raises(UserError, match="of another model|parameters, their gradients"):
            read()
