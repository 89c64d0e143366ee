"""What this process may use of the machine: cores and open files."""

import contextlib
import os
import resource


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
