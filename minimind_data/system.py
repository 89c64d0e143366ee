"""What this process may use of the machine: cores and open files."""

import contextlib
import os
import resource


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files to `count` and some more, as far as the system lets it.

    A memory map keeps its file open, and the limit is often 1,024 where thousands are allowed to whoever asks.
    """
    wanted = count + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS has a lower limit that it does not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
