"""How many cores this process may use, and the environment that keeps encoders to one thread each."""

import os

CORES_PER_PROCESS = 4
"""A process keeps about this many busy; above, one Python thread that reads and parses JSON is what costs."""
ENCODER_ENVIRONMENT = {
    "FASTOKENS_BPE_THREADS": "1",
    "FASTOKENS_SPIN_US": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Keeps encoders to the thread that calls them; they ask once, at their first batch.

Several of our threads, each with a block of its own, keep the same cores busy with a fifth less work than threads inside the
encoder, which share out every batch anew.
"""


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
