"""Our own StepLoader with --shuffle-block 1024: blocks of neighbours are shuffled, and the windows in each, as for a slow disk.

It stands beside the loaders that shuffle chunks, or not at all.
"""

import functools

from load_ours import batches, grow, write
from load_task import run

if __name__ == "__main__":
    run(write=write, batches=functools.partial(batches, block=1024), grow=grow)
