"""A run at its end: it is extended, left alone or refused, and no word that was said to it is lost."""

import shutil

import pytest

from minimind_data.errors import UserError
from minimind_train.run import entry
from minimind_train.run.entry import resume
from minimind_train.run_folder import checkpoint
from minimind_train.run_folder.record import Change, RunRecord
from tests.helpers.runs import Said, config_of, metrics, steps, stop_after


@pytest.fixture
def finished(tmp_path, whole_run):
    return shutil.copytree(whole_run, tmp_path / "run")


def files_of(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_later_end_extends_it(finished, small_dataset, tmp_path):
    outcome = resume(finished, {"steps": 15}, allow_change={"steps"}, say=Said())
    assert (outcome.step, outcome.total_steps, outcome.position) == (15, 15, 120)
    assert steps(finished) == list(range(1, 16))
    assert RunRecord.read(finished).changes == (Change(step=12, name="steps", old=12, new=15),)


def test_epochs_extend_it_with_what_else_is_changed_then(begin, tmp_path):
    first, _ = begin(steps=None, epochs=1, save_every=0)
    run = tmp_path / "run"
    n = first.position
    with pytest.raises(UserError, match=r"epochs \(in the run: 1, asked for: 3\).*`allow_change` epochs"):
        resume(run, {"epochs": 3}, say=Said())
    outcome = resume(
        run, {"epochs": 3, "skip_positions": (f"{n + 4}:{n + 20}",)}, allow_change={"epochs"}, say=Said()
    )
    assert outcome.position == 3 * n
    assert outcome.step == first.step + -(-(2 * n - 16) // 8)
    assert [record["position"] for record in metrics(run)][first.step] == n + 8 + 16


@pytest.mark.parametrize(
    ("given", "allowed", "name"),
    [
        ({"skip_positions": ("200:210",)}, (), "`skip_positions`"),
        ({"learning_rate": 0.1}, ("learning_rate",), "`learning_rate`"),
        ({"steps": 11, "seed": 1}, ("steps", "seed"), "`seed`"),
    ],
)
def test_what_could_change_nothing_any_more_is_refused(finished, given, allowed, name):
    before = files_of(finished)
    with pytest.raises(
        UserError, match=f"finished already, 12 steps, so there is nothing that {name} could change"
    ):
        resume(finished, given, allow_change=allowed, say=Said())
    assert files_of(finished) == before


def test_new_weights_of_a_mixture_too(tmp_path, small_dataset, other_dataset):
    def parts(a, b):
        return (f"a={small_dataset}:{a}", f"b={other_dataset}:{b}")

    run = tmp_path / "run"
    entry.begin(config_of(run, parts(1, 1), steps=2), Said())
    before = files_of(run)
    with pytest.raises(UserError, match="nothing that `reweight` could change"):
        resume(run, {"shards": parts(1, 3)}, allow_change={"weights"}, say=Said())
    assert files_of(run) == before
    resume(run, {"shards": parts(1, 3), "steps": 3}, allow_change={"weights", "steps"}, say=Said())
    assert steps(run) == [1, 2, 3]


def test_an_end_that_is_reached_already_is_noted_and_stays(stopped_run):
    said = Said()
    resume(stopped_run, {"steps": 6}, allow_change={"steps"}, say=said)
    assert "finished already, 6 steps; nothing to do" in said.text
    assert RunRecord.read(stopped_run).options["steps"] == 6
    said = Said()
    assert resume(stopped_run, {}, say=said).step == 6
    assert "finished already, 6 steps" in said.text


@pytest.mark.parametrize("end", [{}, {"steps": None, "epochs": 1}])
def test_it_is_not_begun_again_because_its_checkpoints_are_gone(begin, tmp_path, end):
    outcome, _ = begin(**end, log_every=5)
    run = tmp_path / "run"
    for step in checkpoint.steps_of(run):
        shutil.rmtree(checkpoint.folder_of(run, step))
    before = files_of(run)
    for given in ({}, {"steps": 50}):
        with pytest.raises(
            UserError,
            match=rf"run: finished at step {outcome.step}, and its checkpoints are gone; bring them back",
        ):
            resume(run, given, allow_change={"steps", "epochs"}, say=Said())
        assert files_of(run) == before
        shutil.rmtree(run / "checkpoints", ignore_errors=True)


def test_an_extended_run_was_finished_too(finished):
    resume(finished, {"steps": 13, "save_every": 0}, allow_change={"steps"}, say=Said())
    assert RunRecord.read(finished).finished == 13


def test_a_run_that_came_to_its_end_without_a_checkpoint_begins_again(begin, tmp_path):
    """As when the disk was full at its only save: all is in the metrics, and nothing else is there."""
    begin(steps=3, save_every=0)
    run = tmp_path / "run"
    stop_after(run, 0)
    said = Said()
    assert resume(run, {}, say=said).step == 3
    assert "no checkpoint yet, so the run begins again" in said.text
    assert checkpoint.steps_of(run) == [3]
