"""What this process may use of the machine, cores and open files, and how it starts others without their hearing Ctrl-C."""

import contextlib
import os
import resource
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allow_open_files(count: int) -> None:
    """Raise this process's limit on open files to somewhat more than `count`, as far as the system allows.

    A memory map keeps its file open. The limit is often 1,024 although a process may raise it to many thousands.
    """
    target = count + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < target:
        most = target if hard == resource.RLIM_INFINITY else min(target, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS has a lower limit that it does not report
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@contextlib.contextmanager
def sigint_blocked() -> Iterator[None]:
    """Block SIGINT in this thread for the block: a process that is spawned there has it blocked from its first moment.

    Ctrl-C on a terminal reaches that process too, which would answer with a traceback while it imports its modules.
    """
    # The helper of multiprocessing starts with the first process that is spawned, and unblocks SIGINT when it has: so it starts before.
    resource_tracker.ensure_running()
    former_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former_mask)
