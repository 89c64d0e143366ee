"""How many cores there are, and how many of them an encoder is told to take."""

import os

CORES_PER_PROCESS = 4
"""A process keeps about this many busy; above, one Python thread that reads and parses JSON is what costs."""
_ENCODER_THREADS = ("RAYON_NUM_THREADS", "FASTOKENS_BPE_THREADS")
_NO_SPINNING = {"FASTOKENS_SPIN_US": "0"}  # idle encoder threads would take the cores that parse and write


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encoder_environment(num_threads: int) -> dict[str, str]:
    """Return the environment variables that bound an encoder's threads; encoders read them once, at their first batch."""
    return {**dict.fromkeys(_ENCODER_THREADS, str(num_threads)), **_NO_SPINNING}
