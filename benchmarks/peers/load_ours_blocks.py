"""Our StepLoader with --shuffle-block 1024: blocks of neighbours are shuffled, and the windows in each block, as for a slow disk.

It is to be compared with loaders that shuffle chunks, or nothing.
"""

import functools

from load_ours import batches, grow, write
from load_task import run

if __name__ == "__main__":
    run(write=write, batches=functools.partial(batches, block=1024), grow=grow)
