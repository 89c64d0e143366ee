"""Runs that were moved or copied, with their datasets or without: what their records name is found where it is now."""

import shutil
from dataclasses import replace

import pytest

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.errors import UserError
from minimind_train.run import entry
from minimind_train.run.entry import resume
from minimind_train.run.location import locate
from minimind_train.run.opening import open_run
from minimind_train.run_folder.record import RunRecord
from minimind_train.weights.loading import model_of
from tests.helpers.datasets import text_dataset
from tests.helpers.runs import Said, config_of, metrics, stop_after, weights


def as_before(run):
    """Take from a record what earlier versions did not write."""
    replace(RunRecord.read(run), relative_paths={}, validation=None).write(run)


@pytest.fixture
def project(tmp_path):
    """A tree with two datasets, a validation set and a run of them that stopped after step 6 of 12."""
    there = tmp_path / "there"
    text_dataset(there / "data" / "en")
    text_dataset(there / "data" / "zh", seed=1)
    text_dataset(there / "data" / "zh" / "val", seed=2)
    shards = (f"en={there}/data/en:1", f"zh={there}/data/zh:3")
    val = str(there / "data" / "zh" / "val")
    entry.begin(config_of(there / "runs" / "run", shards, val_shards=val, val_every=4, keep=0), Said())
    shutil.copytree(there / "runs" / "run", tmp_path / "whole")
    stop_after(there / "runs" / "run", 6)
    return there


def test_a_record_has_each_path_from_the_run_folder_too(project):
    record = RunRecord.read(project / "runs" / "run")
    assert record.options["shards"] == [f"en={project}/data/en:1", f"zh={project}/data/zh:3"]
    assert record.relative_paths == {
        f"{project}/data/en": "../../data/en",
        f"{project}/data/zh": "../../data/zh",
        f"{project}/data/zh/val": "../../data/zh/val",
    }


@pytest.mark.parametrize("old_record", [False, True])
def test_a_tree_that_has_moved_is_read_where_it_is(project, tmp_path, old_record):
    if old_record:
        as_before(project / "runs" / "run")
    here = tmp_path / "a" / "b" / "here"
    here.parent.mkdir(parents=True)
    project.rename(here)
    run, said = here / "runs" / "run", Said()
    assert locate(run, 5)["part"] in {"en", "zh"}
    assert len(open_run(run, say=said).windows)
    assert resume(run, {}, say=said).step == 12
    assert f"the dataset that the record has at {project}/data/zh is read from {here}/data/zh" in said.text
    assert f"the validation set that the record has at {project}/data/zh/val is read from {here}" in said.text
    assert metrics(run) == metrics(tmp_path / "whole")
    assert weights(run, 12) == weights(tmp_path / "whole", 12)
    record = RunRecord.read(run)
    assert record.changes == ()
    assert record.options["val_shards"] == f"{here}/data/zh/val"


def test_a_copy_reads_its_own_data_while_they_are_the_same(project, tmp_path):
    here = shutil.copytree(project, tmp_path / "here")
    said = Said()
    resume(here / "runs" / "run", {}, say=said)
    assert f"is read from {here}/data/en" in said.text
    # Where only the run was copied, beside other data, it reads the recorded ones.
    alone = tmp_path / "elsewhere"
    shutil.copytree(project / "runs", alone / "runs")
    text_dataset(alone / "data" / "en", seed=7)
    said = Said()
    resume(alone / "runs" / "run", {}, say=said)
    assert "is read from" not in said.text
    assert metrics(alone / "runs" / "run") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("old_record", [False, True])
def test_nothing_else_is_taken_for_a_dataset_that_is_gone(project, old_record):
    run = project / "runs" / "run"
    if old_record:
        as_before(run)
    shutil.rmtree(project / "data" / "zh")
    text_dataset(project / "data" / "zh", seed=5)
    project.rename(project.with_name("here"))
    run = project.with_name("here") / "runs" / "run"
    with pytest.raises(UserError, match=rf"{project}/data/zh: no dataset.*say where by `shards`"):
        resume(run, {}, say=Said())


def test_a_validation_set_that_is_gone_is_asked_for(project):
    shutil.rmtree(project / "data" / "zh" / "val")
    with pytest.raises(UserError, match=r"zh/val: no dataset.*say where by `val_shards`"):
        resume(project / "runs" / "run", {}, say=Said())


@pytest.mark.parametrize("old_record", [False, True])
def test_the_weights_that_a_run_began_from_move_with_it(tmp_path, old_record):
    there, here = tmp_path / "there", tmp_path / "here"
    (there / "text.txt").parent.mkdir()
    (there / "text.txt").write_text("That is what 4 + 4 is. Yes. I do not know.\n" * 40)
    tokenize([there / "text.txt"], TokenizeOptions(out=there / "data", workers=1))
    entry.begin(config_of(there / "runs" / "base", there / "data", steps=3), Said())
    from_weight = str(there / "runs" / "base")
    entry.begin(config_of(there / "runs" / "tuned", there / "data", from_weight=from_weight, steps=3), Said())
    adapters = config_of(
        there / "runs" / "adapters", there / "data", from_weight=from_weight, steps=1, lora_rank=2
    )
    entry.begin(adapters, Said())
    run = here / "runs" / "tuned"
    if old_record:
        as_before(there / "runs" / "tuned")
    there.rename(here)
    stop_after(run, 0)  # so that they are needed
    assert model_of(here / "runs" / "adapters", step=None, say=Said())
    said = Said()
    assert resume(run, {}, say=said).step == 3
    assert f"{from_weight} are read from {here}/runs/base" in said.text
    assert RunRecord.read(run).options["from_weight"] == f"{here}/runs/base"
