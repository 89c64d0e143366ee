"""Ctrl-C while the main thread runs no Python, as in a long backward pass: answered at once, and obeyed soon after the second."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from minimind_train.parallel.interrupt import StopRequest

pytestmark = pytest.mark.slow

PROGRAM = """
import ctypes
from minimind_train.parallel.interrupt import StopRequest

libc = ctypes.CDLL(None)
lock = ctypes.create_string_buffer(64)
libc.pthread_mutex_init(lock, None)
with StopRequest(acknowledges=True) as request:
    print("here", flush=True)
    {deed}
    print(request.stop.what, flush=True)
"""
DEADLOCK = "libc.pthread_mutex_lock(lock); libc.pthread_mutex_lock(lock)"
"""A call that never comes back, and that no signal interrupts."""


def started(deed):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(deed=deed)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "here\n"
    time.sleep(0.3)  # until it is in the call
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_step_that_runs_no_python_answers_the_first_and_ends_with_the_second(number):
    process = started(DEADLOCK)
    begin = time.monotonic()
    process.send_signal(number)
    line = process.stderr.readline()
    assert line.startswith(f"{number.name}: stops after this step")
    assert time.monotonic() - begin < 1
    assert process.poll() is None
    begin = time.monotonic()
    process.send_signal(number)
    rest = process.communicate(timeout=20)[1]
    assert time.monotonic() - begin < 1.5
    assert (process.returncode, rest) == (128 + number, "error: interrupted\n")


def test_the_first_lets_the_step_end():
    process = started("import time; time.sleep(1.5)")
    process.send_signal(signal.SIGINT)
    told, said = process.communicate(timeout=20)
    assert (process.returncode, told) == (0, "SIGINT\n")
    assert said.count("stops after this step") == 1


def test_where_python_runs_the_second_is_an_exception_as_ever():
    process = started("import time; [time.sleep(0.01) for _ in range(1000)]")
    process.send_signal(signal.SIGINT)
    process.stderr.readline()
    time.sleep(
        1
    )  # the thread may have said it before the handler ran, and then two signals would be one to the handler
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == -signal.SIGINT
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert "error: interrupted" not in said


def test_nothing_is_left_of_a_request_and_an_event_loop_hears_what_it_hears():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    former = signal.set_wakeup_fd(writing)
    try:
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        with StopRequest() as request:
            signal.raise_signal(signal.SIGTERM)
        assert request.signal == signal.SIGTERM
        assert os.read(reading, 9) == bytes([signal.SIGTERM])
        assert signal.set_wakeup_fd(writing) == writing
        deadline = time.monotonic() + 10
        while len(list(Path("/proc/self/fd").iterdir())) > descriptors:
            assert time.monotonic() < deadline
    finally:
        signal.set_wakeup_fd(former)
        for descriptor in (reading, writing):
            with suppress(OSError):
                os.close(descriptor)


def test_a_process_that_starts_first_has_sigint_blocked(tmp_path):
    """The helper of multiprocessing, which starts with it, must not unblock the signal."""
    (tmp_path / "child.py").write_text(
        "import signal\n"
        "def masked(pipe):\n"
        "    pipe.send(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))\n"
    )
    program = (
        "import multiprocessing\n"
        "from child import masked\n"
        "from minimind_data.system import sigint_blocked\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    ours, theirs = context.Pipe()\n"
        "    process = context.Process(target=masked, args=(theirs,))\n"
        "    with sigint_blocked():\n"
        "        process.start()\n"
        "    print(ours.recv())\n"
    )
    (tmp_path / "parent.py").write_text(program)
    told = subprocess.run(
        [sys.executable, "parent.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert told.stdout == "True\n"
