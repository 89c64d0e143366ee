"""`begin_or_resume`: one call for a job that is started again and again, whatever an earlier start left."""

import os

import pytest

from minimind_data.errors import UserError
from minimind_train.run.entry import begin_or_resume
from tests.helpers.runs import Said, config_of, metrics, stop_after, weights


class Killed(BaseException):
    """Raised by each rename from a certain one on, as if the process were gone."""


@pytest.fixture
def again(tmp_path, small_dataset):
    """Call it for the run in the folder tmp_path/run, with these options."""

    def again(**options):
        said = Said()
        return begin_or_resume(config_of(tmp_path / "run", small_dataset, **options), said), said

    return again


def files(run):
    return {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_it_begins_a_run_goes_on_with_it_and_leaves_its_end_alone(again, tmp_path, whole_run):
    run, options = tmp_path / "run", {"keep": 0, "dropout": 0.1}
    assert again(**options)[0].step == 12
    assert weights(run, 12) == weights(whole_run, 12)
    stop_after(run, 6)
    _, said = again(**options)
    assert "going on after step 6 of 12 at position 48" in said.text
    assert weights(run, 12) == weights(whole_run, 12)
    assert metrics(run) == metrics(whole_run)
    before = files(run)
    outcome, said = again(**options)
    assert "finished already, 12 steps" in said.text
    assert (outcome.step, outcome.loss) == (12, None)
    assert files(run) == before


def test_whatever_a_kill_left_before_the_first_checkpoint_the_next_start_goes_on(
    again, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    again(steps=2, save_every=100)
    whole = weights(run, 2), metrics(run)
    rename = os.replace
    for number in range(100):
        run = run.rename(tmp_path / f"whole-{number}").parent / "run"
        calls = []

        def replace(*paths, calls=calls, number=number):
            calls.append(paths)
            if len(calls) > number:
                raise Killed
            rename(*paths)

        monkeypatch.setattr(os, "replace", replace)
        try:
            again(steps=2, save_every=100)
        except Killed:
            monkeypatch.setattr(os, "replace", rename)
            again(steps=2, save_every=100)
            assert (weights(run, 2), metrics(run)) == whole
        else:
            break
    assert number > 3  # the tokenizer, run.toml, config.json and the checkpoint at least


def test_options_that_the_run_was_not_begun_with_are_refused_as_at_a_resume(again):
    again(steps=3)
    with pytest.raises(UserError, match="learning_rate"):
        again(steps=3, learning_rate=0.1)


def test_samples_left_out_are_left_out_once(again, tmp_path):
    again(steps=3, skip_positions=("2:4",))
    seen = [record["position"] for record in metrics(tmp_path / "run")]
    stop_after(tmp_path / "run", 0)
    again(steps=3, skip_positions=("2:4",))
    assert [record["position"] for record in metrics(tmp_path / "run")] == seen == [10, 18, 26]


def test_a_move_of_the_position_would_be_made_at_each_start(again):
    with pytest.raises(UserError, match="move it once, by `resume`"):
        again(resume_from="text-00000:0", order="sequential")
