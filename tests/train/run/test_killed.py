"""Runs that are killed in real processes, wherever it hurts, end bit for bit as one that never was."""

import json
import secrets
import signal

import pytest

from minimind_train.run_folder import checkpoint
from tests.helpers.commands import MAIN, STARTED, flags, start, wait_for_step
from tests.helpers.runs import metrics, steps, weights


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory, small_dataset):
    run = tmp_path_factory.mktemp("never-killed") / "run"
    process = start(flags({**STARTED, "shards": small_dataset, "run": run}))
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return run


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_never_was(
    tmp_path, small_dataset, never_killed
):
    run = tmp_path / "run"
    begin = [*flags({**STARTED, "shards": small_dataset, "run": run})]
    again = ["--run", str(run), "--resume"]
    stops = [
        (signal.SIGKILL, 2),
        (signal.SIGKILL, 8 + secrets.randbelow(6)),
        (signal.SIGTERM, 22),
        (signal.SIGINT, 32),
        (signal.SIGKILL, 42 + secrets.randbelow(8)),
    ]
    arguments = begin
    for number, step in stops:
        process = start(arguments)
        wait_for_step(process, run, step)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL, (stops, said)
        else:
            assert process.returncode == 128 + number, (stops, said)
            assert f"stopped by {number.name} after step" in said
            assert f"mm-train pretrain --run {run} --resume" in said
            done = checkpoint.steps_of(run)[-1]
            assert f"after step {done} of 60" in said
            assert steps(run) == list(range(1, done + 1))
        arguments = again
    process = start(again)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, (stops, said)
    assert weights(run, 60) == weights(never_killed, 60), stops
    assert metrics(run) == metrics(never_killed), stops


# The process kills itself where an outer hand would seldom hit: {number} is counted over the calls of {function}.
SUICIDE = """
import os, signal, sys
from pathlib import Path
from minimind_train.run_folder import checkpoint
from minimind_train.run_folder import metrics

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def half_a_line():
    with Path(sys.argv[sys.argv.index("--run") + 1], "metrics.jsonl").open("ab") as file:
        file.write(b'{"st')

def kill_at(owner, name, number, before=lambda *_: None):
    calls, function = [], getattr(owner, name)
    def deadly(*arguments, **keywords):
        calls.append(1)
        if len(calls) == number:
            before(*arguments)
            die()
        return function(*arguments, **keywords)
    setattr(owner, name, deadly)

"""
PLACES = {
    "in the middle of a line of metrics": "kill_at(metrics.MetricsLog, 'write', 6, lambda *_: half_a_line())",
    "half of a file": "kill_at(checkpoint, 'save_file', 4, lambda _, path: path.write_bytes(b'half'))",
    "before the rename": "kill_at(Path, 'rename', 2)",
    "after the rename, before the old ones go": "kill_at(checkpoint, 'steps_of', 4)",
    "an old one half deleted": "kill_at(checkpoint.shutil, 'rmtree', 2, lambda path, **_: (path / 'state.json').unlink())",
    "between the weights' step and its line": "kill_at(metrics.MetricsLog, 'write', 3)",
}


@pytest.mark.slow
def test_the_worst_moments_to_die_are_as_good_as_any(tmp_path, small_dataset, never_killed):
    run = tmp_path / "run"
    arguments = [*flags({**STARTED, "shards": small_dataset, "run": run})]
    for place, deed in PLACES.items():
        process = start(arguments, program=f"{SUICIDE}{deed}\n{MAIN}")
        _, said = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, (place, said)
        arguments = ["--run", str(run), "--resume"]
    process = start(arguments)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert weights(run, 60) == weights(never_killed, 60)
    assert metrics(run) == metrics(never_killed)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-000000056", "step-000000060"}
    assert json.loads((run / "config.json").read_bytes()) == json.loads(
        (never_killed / "config.json").read_bytes()
    )


SHAPE = {"hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
TUNING = {name: value for name, value in STARTED.items() if name not in SHAPE} | {"seq_len": 48, "steps": 24}


@pytest.mark.slow
@pytest.mark.parametrize(("command", "changes"), [("sft", {"lora_rank": 2}), ("dpo", {})])
def test_tuned_runs_are_killed_as_well(tmp_path, sft_dataset, dpo_dataset, chat_base, command, changes):
    shards = sft_dataset if command == "sft" else dpo_dataset
    options = {**TUNING, **changes, "shards": shards, "from_weight": chat_base, "learning_rate": 1e-3}
    whole, run = tmp_path / "whole", tmp_path / "run"
    process = start(flags({**options, "run": whole}), command=command)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    arguments = flags({**options, "run": run})
    for step in (3, 9 + secrets.randbelow(6)):
        process = start(arguments, command=command)
        wait_for_step(process, run, step)
        process.kill()
        _, said = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, (step, said)
        arguments = ["--run", str(run), "--resume"]
    process = start(arguments, command=command)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert weights(run, 24) == weights(whole, 24)
    assert metrics(run) == metrics(whole)
