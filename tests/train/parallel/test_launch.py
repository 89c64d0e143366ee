"""Ranks that are started by us, in real processes: killed in every way, they end together, say why once, and go on in another number."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minimind_data.errors import UserError
from minimind_data.options import options_from
from minimind_train.parallel.launch import launch_ranks
from minimind_train.run import entry
from minimind_train.run.entry import resume
from minimind_train.run.options import PretrainOptions
from minimind_train.run_folder import checkpoint
from tests.helpers.commands import STARTED, flags, start, wait_for_step
from tests.helpers.runs import Said, assert_alike, steps

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def children_of(pid):
    """The processes that a process has started, oldest first, without Python's own helper."""
    pids = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [pid for pid in sorted(pids) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def assert_gone(pids):
    deadline = time.monotonic() + 60
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"left over: {alive}"
        time.sleep(0.05)


def test_a_run_goes_on_in_other_numbers_whoever_was_killed(tmp_path, small_dataset):
    options = STARTED | {"steps": 150, "dropout": 0.0, "dtype": "fp32", "threads": 1, "keep": 0}
    run, alone = tmp_path / "run", tmp_path / "alone"
    again = ["--run", str(run), "--resume", "--nproc"]

    def begun(arguments, nproc, step):
        process = start([*arguments, str(nproc)])
        wait_for_step(process, run, step)
        ranks = children_of(process.pid)
        assert len(ranks) == nproc
        return process, ranks

    process, ranks = begun([*flags({**options, "shards": small_dataset, "run": run}), "--nproc"], 2, 20)
    os.kill(ranks[1], signal.SIGKILL)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 1, said
    assert said.count("error: rank 1 of 2 was killed by SIGKILL") == said.count("error:") == 1
    assert "Traceback" not in said
    assert_gone(ranks)

    process, ranks = begun(again, 3, len(steps(run)) + 10)
    for pid in (process.pid, *ranks):  # as Ctrl-C on a terminal does
        os.kill(pid, signal.SIGINT)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGINT, said
    last = checkpoint.steps_of(run)[-1]
    assert said.count("SIGINT: stops after this step") == 1
    assert said.count(f"stopped by SIGINT after step {last} of 150") == said.count("stopped by") == 1
    assert "Traceback" not in said
    assert steps(run) == list(range(1, last + 1))
    assert_gone(ranks)

    resume(run, {"nproc": 1}, say=Said())
    entry.begin(options_from(PretrainOptions, {**options, "shards": small_dataset, "run": alone}), Said())
    assert_alike(run, alone, 150, rel=1e-4)


WORK = """
import time
from minimind_data.errors import UserError
from minimind_train.parallel.launch import launch_ranks

def work(world):
    if world.rank == 1:
        DEED
    world.barrier()
"""


@pytest.mark.parametrize(
    ("deed", "sentence", "remedy"),
    [
        (
            "raise UserError('is full', where='/disk', remedy='make room')",
            "^/disk: is full; make room$",
            "make room",
        ),
        (
            "raise KeyError('x')",
            r"^rank 1 of 2 failed \(KeyError: 'x'; the traceback is above\), so the others",
            "go on with `resume`, which may have another `nproc`",
        ),
    ],
)
def test_what_one_rank_says_is_the_reason(tmp_path, monkeypatch, deed, sentence, remedy):
    (tmp_path / "deeds.py").write_text(WORK.replace("DEED", deed))
    monkeypatch.syspath_prepend(tmp_path)  # that of the ranks too
    monkeypatch.delitem(sys.modules, "deeds", raising=False)
    with pytest.raises(UserError, match=sentence) as reason:
        launch_ranks(importlib.import_module("deeds").work, 2)
    assert reason.value.remedy == remedy


def begun_to_work(folder, deed):
    """A process whose ranks work, which rank 1 has said."""
    (folder / "deeds.py").write_text(WORK.replace("DEED", deed))
    program = "from deeds import *; print(launch_ranks(work, 2))"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here\n"
    return process, children_of(process.pid)


@pytest.mark.parametrize("signals", [[signal.SIGKILL], [signal.SIGTERM, signal.SIGTERM]])
def test_ranks_end_with_the_process_that_started_them(tmp_path, signals):
    process, ranks = begun_to_work(tmp_path, "print('here', flush=True); time.sleep(600)")
    assert len(ranks) == 2
    for number in signals:  # the first SIGTERM is a request, which these ranks never look at
        process.send_signal(number)
        time.sleep(0.5)
    process.communicate(timeout=60)
    assert process.returncode == -signals[-1]
    assert_gone(ranks)


def test_a_signal_to_the_process_that_started_them_reaches_every_rank(tmp_path):
    # The deed ends the condition of its rank, so that all do what follows.
    work = """print('here', flush=True)
    while not (stop := world.agreed_stop(None)):
        time.sleep(0.01)
    return stop.what"""
    process, ranks = begun_to_work(tmp_path, work)
    process.terminate()
    told, _ = process.communicate(timeout=60)
    assert (process.returncode, told) == (0, "SIGTERM\n")
    assert_gone(ranks)
