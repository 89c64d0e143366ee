"""A step whose loss or gradient is no number: the run stops or skips it, and says where it came from."""

import pytest
import torch

from minimind_data.errors import UserError
from minimind_train.training.options import MOST_IN_A_ROW
from tests.helpers.loops import Run, plain_loss


def spoiled(spoil, *, steps, micro_batches=1):
    """The plain loss, spoiled in some steps of the run, for whoever learns and not for whoever looks."""
    calls = []

    def loss(model, micro_batch):
        value = plain_loss(model, micro_batch)
        if not torch.is_grad_enabled():
            return spoil(value, model, micro_batch) if len(calls) // micro_batches in steps else value
        calls.append(1)
        step = (len(calls) - 1) // micro_batches + 1
        return spoil(value, model, micro_batch) if step in steps else value

    return loss


def everywhere(loss, model, micro_batch):
    return loss * float("nan")


def in_window_of(token):
    """A loss that a window beginning with this token makes infinite."""

    def spoil(loss, model, micro_batch):
        return loss / (micro_batch["input_ids"][:, 0] != token).all()

    return spoil


def only_the_gradient(loss, model, micro_batch):
    return loss + (0 * model.model.norm.weight).sqrt().sum()


def state_of(run):
    moments = [
        {key: value.clone() for key, value in run.optimizer.state[p].items()} for p in run.model.parameters()
    ]
    return run.weights, moments


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (
            everywhere,
            "the loss is nan at step 3, from positions 16, 17, 18, 19, 20 and 3 more of the positions 16 to 23",
        ),
        (in_window_of(20), "the loss is inf at step 3, from position 20 of the positions 16 to 23"),
        (only_the_gradient, "the gradient's norm is nan at step 3, from no window alone"),
    ],
)
def test_it_stops_the_run_and_moves_nothing(tmp_path, spoil, what):
    run = Run(tmp_path, kind="sequential", loss=spoiled(spoil, steps={3}, micro_batches=2), micro_batch=4)
    expected = Run(tmp_path, kind="sequential", micro_batch=4)
    expected.go(2)
    with pytest.raises(UserError) as refusal:
        run.go()
    assert what in str(refusal.value)
    assert_same(state_of(run), state_of(expected))
    assert [record["step"] for record in run.metrics] == [1, 2]
    assert run.metrics[-1]["position"] == 16
    assert run.saved == []


def test_the_sentence_names_calls_for_exactly_the_guilty_positions(tmp_path):
    run = Run(tmp_path, kind="sequential", loss=spoiled(in_window_of(20), steps={3}))
    with pytest.raises(UserError) as refusal:
        run.go()
    said = str(refusal.value)
    assert "`locate('runs/it', position=20)`" in said
    assert "`resume('runs/it', {'skip_positions': ['20:21']})`" in said
    run = Run(tmp_path, kind="sequential", loss=spoiled(only_the_gradient, steps={2}))
    with pytest.raises(UserError, match=r"position=8\)`.*'skip_positions': \['8:16'\]\}\)`"):
        run.go()


def test_a_skipped_step_leaves_weights_and_optimizer_alone_and_is_told(tmp_path):
    run = Run(
        tmp_path, on_nonfinite="skip", loss=spoiled(everywhere, steps={2}), log_every=100, total_steps=4
    )
    former = Run(tmp_path, total_steps=4)
    former.go(1)
    states = []
    real = run.save

    def save(record, *, leaving):
        states.append(state_of(run))
        real(record, leaving=leaving)

    run.save = save
    outcome = run.go()
    assert_same(states[1], states[0])
    assert_same(states[0], state_of(former))
    assert outcome.step == 4
    assert outcome.loss == run.metrics[-1]["loss"]
    first, skipped, last = run.metrics
    assert (first["step"], skipped["step"], last["step"]) == (1, 2, 4), "a skipped step always has a line"
    assert skipped["skipped"] == "the loss is nan"
    assert "loss" not in skipped
    assert "skipped_steps" not in first
    assert (skipped["skipped_steps"], last["skipped_steps"]) == (1, 1)
    assert skipped["position"] == 16
    assert any("the step is skipped (1 in a row, at 10 the run ends)" in line for line in run.said)


def test_too_many_in_a_row_end_the_run_and_others_do_not(tmp_path):
    bad = {*range(2, 2 + MOST_IN_A_ROW - 1), 12}
    run = Run(
        tmp_path, on_nonfinite="skip", loss=spoiled(everywhere, steps=bad), total_steps=14, global_batch=2
    )
    assert run.go().step == 14
    assert run.metrics[-1]["skipped_steps"] == len(bad)
    bad = set(range(2, 2 + MOST_IN_A_ROW))
    run = Run(
        tmp_path, on_nonfinite="skip", loss=spoiled(everywhere, steps=bad), total_steps=14, global_batch=2
    )
    with pytest.raises(
        UserError, match=rf"^{MOST_IN_A_ROW} steps in a row: the loss is nan at step {max(bad)}"
    ):
        run.go()
