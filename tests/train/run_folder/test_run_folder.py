"""Run folders: occupied, in use, damaged, or none at all."""

import errno
import json

import pytest

from minimind_data.errors import UserError
from minimind_data.files import FolderLock
from minimind_train.generation.completion import complete
from minimind_train.generation.options import GenerateOptions
from minimind_train.run import entry
from minimind_train.run.entry import resume
from minimind_train.run_folder import record as runs
from minimind_train.run_folder.record import RunRecord
from tests.helpers.runs import Said, config_of


def test_a_folder_that_holds_a_run_is_not_begun_again(begin, tmp_path):
    begin(steps=1)
    with pytest.raises(UserError, match="holds a run already; go on with it by `resume`"):
        begin(steps=1)
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is gone"):
        begin(steps=1)


def test_a_folder_in_use_is_refused(begin, tmp_path, whole_run):
    run = tmp_path / "run"
    run.mkdir()
    with FolderLock(run / ".lock", "busy"), pytest.raises(UserError, match="another process is working"):
        begin()
    with runs.lock(whole_run), pytest.raises(UserError, match="another process is working"):
        resume(whole_run, {})


def test_where_there_is_no_run_it_is_said_how_one_is_made(tmp_path):
    run, file = tmp_path / "my run", tmp_path / "file"
    for folder, what in ((run, "no such folder"), (tmp_path, r"no config\.json in the folder")):
        with pytest.raises(
            UserError,
            match=rf"{folder}: no run there \({what}\); correct the name, or begin one by `mm-train pretrain` .*, without `resume`",
        ):
            resume(folder, {})
    assert list(tmp_path.iterdir()) == []
    file.touch()
    with pytest.raises(UserError, match="file: no run but a file"):
        resume(file, {})
    with pytest.raises(UserError, match="`run` '.*my run', without"):
        RunRecord.read(run)


def test_a_folder_inside_of_a_run_is_led_back_to_it(whole_run):
    checkpoints = whole_run / "checkpoints"
    for folder in (checkpoints, checkpoints / "step-000000003", checkpoints / "step-000000003" / "a" / "b"):
        with pytest.raises(UserError, match=f"{folder}: a folder inside of a run; pass `run` {whole_run}$"):
            RunRecord.read(folder)


def test_a_folder_that_cannot_be_written_is_named(begin, tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("os.open", refuse)
        with pytest.raises(
            UserError, match=r"run: cannot be written \(Permission denied\); make it writable"
        ):
            begin()


def test_a_run_is_not_begun_in_a_file(begin, tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="run: is a file; take another `run`"):
        begin()


def rewritten(change):
    """Damage that goes through JSON: `change` sees all that config.json tells."""

    def damage(text):
        told = json.loads(text)
        change(told)
        return json.dumps(told)

    return damage


DAMAGE = {
    "empty": lambda text: "",
    "no object": lambda text: "[]",
    "nothing in it": lambda text: "{}",
    "half": lambda text: text[: len(text) // 2],
    "deep": lambda text: "[" * 100_000,
    "no text": lambda text: "\udcff",
    "an edited option": rewritten(lambda told: told["options"].update(learning_rate=1.0)),
    "an option of another type": rewritten(lambda told: told["options"].update(seq_len="long")),
    "an unknown option": rewritten(lambda told: told["options"].update(magic=1)),
    "an unknown key": rewritten(lambda told: told.update(magic=1)),
    "a missing key": rewritten(lambda told: told.pop("tokenizer")),
    "no checksum": rewritten(lambda told: told.pop("sha256")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_an_edited_or_damaged_record_is_named(whole_run, tmp_path, damage):
    run, path = tmp_path, tmp_path / "config.json"
    path.write_bytes(damage((whole_run / "config.json").read_text()).encode(errors="surrogateescape"))
    for act in (
        RunRecord.read,
        lambda run: resume(run, {}),
        lambda run: complete(run, "x", GenerateOptions()),
    ):
        with pytest.raises(UserError) as error:
            act(run)
        assert str(error.value).startswith(f"{path}: edited or damaged (")
        assert "from a backup; to change an option of a run, pass it with `resume`" in str(error.value)


@pytest.mark.parametrize("version", [1, 99])
def test_a_record_of_another_version_is_refused(whole_run, tmp_path, version):
    told = json.loads((whole_run / "config.json").read_bytes()) | {"format_version": version}
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(
        UserError, match=f"config.json: format version {version}; this program reads version 2"
    ):
        RunRecord.read(tmp_path)


def test_a_run_is_not_begun_inside_a_dataset(small_dataset):
    before = sorted(small_dataset.iterdir())
    with pytest.raises(UserError, match="is a dataset; take another `run`"):
        entry.begin(config_of(small_dataset, small_dataset), say=Said())
    assert sorted(small_dataset.iterdir()) == before


def test_a_folder_inside_of_what_only_looks_like_a_run_is_no_part_of_one(tmp_path):
    for files in (["config.json"], ["checkpoints/step-000000003/state.json"]):
        for name in files:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        with pytest.raises(UserError, match=r"my run: no run there \(no such folder\)"):
            RunRecord.read(tmp_path / "my run")
        for name in files:
            (tmp_path / name).unlink()
