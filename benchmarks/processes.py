"""Whole processes: run on given cores, timed, and watched for the memory of everything that they start.

Linux only: it reads /proc. A command runs in its own session, so all processes that it starts are found, whoever became their
parent. Time is measured without a watcher; memory is measured in a run of its own, which is not timed. The memory of several
processes is the sum of their proportional set sizes: a page that two of them share counts once, and a page of a mapped file counts
while it is mapped.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_SAMPLES_PER_SECOND = 25
_SESSION_FIELD = 3  # of /proc/PID/stat, counted after the name
_LAST_WORDS = 300


class CommandFailedError(Exception):
    """A command failed; the message has its status and the end of its output."""


@dataclass(frozen=True)
class Memory:
    """Peak memory of a process and all that it started, in MB of 10^6 bytes."""

    total_mb: float
    anonymous_mb: float
    """Without the pages of files, which the system can take back."""
    processes: int
    """At most so many at once."""


def hold_to_cores(count: int) -> None:
    """Restrict this process, and all that it starts from now on, to `count` of its cores."""
    if not hasattr(os, "sched_setaffinity"):
        sys.exit("this benchmark needs Linux: it holds processes to cores and reads their memory from /proc")
    cores = sorted(os.sched_getaffinity(0))[:count]
    if len(cores) < count:
        sys.exit(f"--cores {count}: this process may use only {len(cores)}")
    os.sched_setaffinity(0, cores)


def timed(command: Sequence[str], environment: dict[str, str] | None = None) -> float:
    """Run a command; return its wall-clock seconds.

    Raises:
        CommandFailedError: its exit status is not 0.
    """
    start = time.perf_counter()
    with _running(command, environment) as process:
        process.wait()
        return time.perf_counter() - start


def watched(command: Sequence[str], environment: dict[str, str] | None = None) -> Memory:
    """Run a command; return the highest memory that all of its processes had together at one moment.

    Raises:
        CommandFailedError: its exit status is not 0.
    """
    total = anonymous = processes = 0
    with _running(command, environment) as process:
        while process.poll() is None:
            sizes = [size for pid in _session(process.pid) if (size := _memory_of(pid))]
            total = max(total, sum(size[0] for size in sizes))
            anonymous = max(anonymous, sum(size[1] for size in sizes))
            processes = max(processes, len(sizes))
            time.sleep(1 / _SAMPLES_PER_SECOND)
    return Memory(total / 1e6, anonymous / 1e6, processes)


@contextlib.contextmanager
def _running(command: Sequence[str], environment: dict[str, str] | None) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command in its own session, check that it succeeds, and leave none of its processes running."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode:
            log.seek(0)
            words = log.read().decode(errors="replace").split()
            raise CommandFailedError(
                f"exit status {process.returncode}: {' '.join(words)[-_LAST_WORDS:]}".strip()
            )


def _session(leader: int) -> list[int]:
    """Return the processes of a session."""
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended in the meantime
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[_SESSION_FIELD]) == leader:
                members.append(int(path.parent.name))
    return members


def _memory_of(pid: int) -> tuple[int, int] | None:
    """Return a process's proportional set size, all of it and the anonymous part, in bytes; None if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    sizes = {name: rest.split()[0] for name, _, rest in (line.partition(":") for line in lines[1:])}
    return (1024 * int(sizes["Pss"]), 1024 * int(sizes["Pss_Anon"])) if sizes else None
