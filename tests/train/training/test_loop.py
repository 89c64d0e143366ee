"""The loop: what is learned depends on neither the cut of a batch nor on a stop in between, and metrics say what happened."""

import json
import os
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minimind_train.order.seeds import derive_seed
from minimind_train.parallel.interrupt import Stop, StopRequest
from minimind_train.training import loop
from minimind_train.training.optim import learning_rate
from minimind_train.training.options import TrainingOptions
from tests.helpers.loops import OPTIM, Run, Windows, plain_loss


def test_a_step_is_adamw_on_the_mean_over_all_targets(tmp_path):
    run = Run(tmp_path, total_steps=1)
    expected = Run(tmp_path, total_steps=1)
    batch = Windows().fetch(run.order.windows(np.arange(8)))
    inputs, targets = (torch.from_numpy(batch[name]) for name in ("input_ids", "targets"))
    logits = expected.model.logits(expected.model(inputs))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(expected.model.parameters(), 1.0)
    for group in expected.optimizer.param_groups:
        group["lr"] = learning_rate(1, 1, OPTIM)
    expected.optimizer.step()
    outcome = run.go()
    for ours, theirs in zip(run.weights, expected.weights, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert outcome == loop.RunOutcome(step=1, total_steps=1, position=8, loss=outcome.loss)
    assert outcome.loss == pytest.approx(loss.item())
    record = run.metrics[0]
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert record["targets"] == (targets != -100).sum()
    assert record["lr"] == learning_rate(1, 1, OPTIM)


@pytest.mark.parametrize("micro_batch", [1, 3, 7])
def test_the_cut_into_micro_batches_changes_only_rounding(tmp_path, micro_batch):
    whole, cut = Run(tmp_path, micro_batch=8), Run(tmp_path, micro_batch=micro_batch)
    whole.go()
    losses = [record["loss"] for record in whole.metrics]
    cut.go()
    assert [record["loss"] for record in cut.metrics] == pytest.approx(losses, rel=1e-4)
    for ours, theirs in zip(cut.weights, whole.weights, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_it_learns(tmp_path):
    run = Run(tmp_path, total_steps=15)
    run.go()
    assert run.metrics[-1]["loss"] < 0.8 * run.metrics[0]["loss"]
    assert run.metrics[-1]["position"] == run.position == 120
    assert [record["epoch"] for record in run.metrics] == [0] * 5 + [1] * 5 + [2] * 5


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("stop", [1, 3])
def test_two_halves_are_the_whole_bit_for_bit(tmp_path, dropout, stop):
    whole, halves = (Run(tmp_path, dropout=dropout, micro_batch=3) for _ in range(2))
    whole.go()
    there = whole.metrics
    halves.go(stop)
    torch.manual_seed(stop)  # whatever happened to the global generator in between
    halves.go()
    for ours, theirs in zip(halves.weights, whole.weights, strict=True):
        assert torch.equal(ours, theirs)
    for lines in (there, here := halves.metrics):
        for record in lines:
            del record["tokens_per_second"]
    assert here == there


def test_dropout_differs_from_step_to_step_and_from_seed_to_seed():
    assert len({derive_seed(*numbers) for numbers in np.ndindex(12, 12, 3)}) == 12 * 12 * 3


@pytest.mark.parametrize(("every", "logged"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 3, 6, 7]), (100, [1, 7])])
def test_the_first_the_last_and_every_nth_step_is_logged(tmp_path, every, logged):
    run = Run(tmp_path, total_steps=7, log_every=every)
    run.go()
    assert [record["step"] for record in run.metrics] == logged
    # Off a terminal the metrics are the record; what is said comes now and then, the last step always.
    assert [line.split()[1] for line in run.said] == ["1/7", "7/7"]


def test_a_batch_of_nothing_but_padding_divides_nothing_by_zero(tmp_path):
    run = Run(tmp_path, kind="sequential", global_batch=1)
    run.go()
    assert [record["targets"] for record in run.metrics] == [6, 6, 6, 0, 6]
    assert run.metrics[3]["loss"] == 0
    assert all(torch.isfinite(weight).all() for weight in run.weights)


def loss_that_sends(number, *, at):
    calls = []

    def loss(model, micro_batch):
        calls.append(1)
        if len(calls) in at:
            os.kill(os.getpid(), number)
        return plain_loss(model, micro_batch)

    return loss


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_and_saves(tmp_path, number, capfd):
    former = signal.getsignal(number)
    run = Run(tmp_path, loss=loss_that_sends(number, at=[2]), log_every=10)
    outcome = run.go()
    assert f"{signal.Signals(number).name}: stops after this step" in capfd.readouterr().err
    assert outcome.stopped_by == Stop[signal.Signals(number).name] == 128 + number
    assert (outcome.step, outcome.position, run.saved) == (2, 16, [(2, 16)])
    assert [record["step"] for record in run.metrics] == [1], (
        "a stop adds no line that the whole run would not have"
    )
    assert signal.getsignal(number) == former


def test_a_signal_in_the_last_step_stops_nothing(tmp_path):
    run = Run(tmp_path, loss=loss_that_sends(signal.SIGTERM, at=[5]))
    assert run.go().stopped_by is None
    assert run.saved == [(5, 40)]


def test_a_second_interrupt_is_obeyed_at_once(tmp_path):
    run = Run(tmp_path, loss=loss_that_sends(signal.SIGINT, at=[3, 4]), micro_batch=4)
    with pytest.raises(KeyboardInterrupt):
        run.go()
    assert run.saved == []
    assert [record["step"] for record in run.metrics] == [1]


def test_when_the_time_is_up_the_step_ends_and_is_saved(tmp_path, monkeypatch):
    clock = iter([1000.0, 1000.0, 1000.0 + 3599, 1000.0 + 3600])
    monkeypatch.setattr(
        "minimind_train.parallel.interrupt.time", SimpleNamespace(monotonic=lambda: next(clock))
    )
    run = Run(tmp_path, max_hours=1.0, log_every=100)
    outcome = run.go()
    assert outcome.stopped_by is Stop.MAX_HOURS
    assert (outcome.step, run.saved) == (3, [(3, 24)])


def test_outside_the_main_thread_signals_are_left_alone():
    heard = []

    def listen():
        with StopRequest() as stop:
            heard.append(stop.signal)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert heard == [None]


def test_the_line_of_metrics(tmp_path):
    run = Run(tmp_path, total_steps=1)
    run.go()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line.endswith("}\n")
    assert list(json.loads(line)) == [
        "step", "position", "epoch", "loss", "grad_norm", "targets", "lr", "tokens_per_second",
    ]  # fmt: skip


def test_the_progress_line_fits_a_terminal(tmp_path, monkeypatch):
    class Terminal:
        text = ""

        def isatty(self):
            return True

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    run = Run(tmp_path, total_steps=15, log_every=1)
    run.go()
    assert run.said == []
    frames = [frame for frame in terminal.text.replace("\n", "\r").split("\r") if frame.strip()]
    assert max(map(len, frames)) <= 80
    assert "15/15" in frames[-1]
    assert all(word in frames[-1] for word in ("loss", "lr", "tok/s", "left"))


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 1, "steps": 1},
        {"epochs": 0},
        {"steps": 0},
        {"global_batch": 0},
        {"micro_batch": 0},
        {"log_every": 0},
        {"threads": -1},
        {"threads": 10**6},
        {"seed": -1},
        {"seed": 2**64},
        {"global_batch": 10**12},
        {"micro_batch": 10**12},
        {"epochs": 10**18},
        {"steps": 10**400},
        {"log_every": 10**18},
        {"max_hours": -1.0},
        {"max_hours": float("nan")},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TrainingOptions(**options)


def test_a_signal_after_the_moment_of_saving_ends_the_next_step_saved(tmp_path, monkeypatch):
    """Whatever the moment: a run that says it was stopped by a signal has saved the step that it names."""
    real, calls = loop.time.perf_counter, []

    def signalling():
        calls.append(1)
        if (
            len(calls) == 5
        ):  # the clock is read once before the steps and twice in each: this is the end of the second
            signal.raise_signal(signal.SIGTERM)
        return real()

    run = Run(tmp_path, total_steps=5)
    monkeypatch.setattr(loop.time, "perf_counter", signalling)
    outcome = run.go()
    assert outcome.stopped_by is Stop.SIGTERM
    assert outcome.step in (2, 3)
    assert [step for step, _ in run.saved] == [outcome.step]
