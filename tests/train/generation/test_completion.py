"""`complete` beside a run that is still training, which deletes what is being read; and where there is nothing to read."""

import shutil
from dataclasses import replace

import pytest

from minimind_data.errors import UserError
from minimind_train.generation.completion import complete
from minimind_train.generation.options import GenerateOptions
from minimind_train.run_folder import checkpoint

OPTIONS = GenerateOptions(max_new_tokens=6)


def text_of(run, **options):
    return "".join(complete(run, "北京", OPTIONS, device="cpu", say=pytest.fail, **options))


@pytest.fixture
def training_run(tmp_path, whole_run, monkeypatch):
    """A run that keeps one checkpoint and, `race(function, times)`, saves the next while `checkpoint.function` is reading one."""
    run = tmp_path / "run"
    shutil.copytree(whole_run, run, ignore=shutil.ignore_patterns("step-*"))
    waiting = iter(checkpoint.steps_of(whole_run))

    def save_next():
        step = next(waiting, None)
        if step is not None:
            shutil.copytree(checkpoint.folder_of(whole_run, step), checkpoint.folder_of(run, step))
        for old in checkpoint.steps_of(run):
            if step is None or old < step:
                shutil.rmtree(checkpoint.folder_of(run, old))

    def race(function, times):
        real, left = getattr(checkpoint, function), [True] * times

        def racing(*arguments, **options):
            if left:
                left.pop()
                save_next()
            return real(*arguments, **options)

        monkeypatch.setattr(checkpoint, function, racing)

    save_next()
    return run, race


@pytest.mark.parametrize("function", ["read_checked", "sha256_of", "StoredTensors"])
def test_a_checkpoint_that_is_deleted_while_it_is_read_gives_way_to_a_newer_one(
    training_run, whole_run, function
):
    run, race = training_run
    race(function, 2)
    assert text_of(run) == text_of(whole_run, checkpoint=9)


@pytest.mark.parametrize("function", ["read_checked", "StoredTensors"])
def test_a_run_that_deletes_faster_than_one_can_read_is_a_sentence_at_last(
    training_run, whole_run, function, monkeypatch
):
    run, _ = training_run
    found = checkpoint.load_latest(whole_run, pytest.fail)
    gone = replace(found, folder=checkpoint.folder_of(run, 8))
    if function == "StoredTensors":
        monkeypatch.setattr(checkpoint, "load_latest", lambda *_: gone)
    else:
        monkeypatch.setattr(checkpoint, "steps_of", lambda _: [8])
    with pytest.raises(
        UserError, match="step-000000008: deleted while it was read, by a run that is still training"
    ):
        text_of(run)


def test_a_checkpoint_that_was_asked_for_and_is_deleted_meanwhile_is_named(training_run):
    run, race = training_run
    race("StoredTensors", 1)
    with pytest.raises(UserError, match="step-000000003: deleted while it was read"):
        text_of(run, checkpoint=3)
    with pytest.raises(UserError, match="no checkpoint of step 3; there are: 6"):
        text_of(run, checkpoint=3)
    for step in (-1, 10**400):
        with pytest.raises(UserError, match="no checkpoint of step"):
            text_of(run, checkpoint=step)


def test_what_has_no_checkpoint_says_so(tmp_path, whole_run):
    shutil.copy(whole_run / "config.json", tmp_path)
    with pytest.raises(UserError, match="no checkpoint yet; the first comes after `save_every` steps"):
        text_of(tmp_path)
    with pytest.raises(UserError, match=r"no such folder.*begin one by `mm-train pretrain"):
        text_of(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: no run but a file"):
        text_of(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json in the folder.*begin one by `mm-train pretrain"):
        text_of(tmp_path / "empty")
