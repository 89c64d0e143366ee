"""Our StepLoader with --order sequential: windows in the order of the shards, to be compared with a loader that does not shuffle."""

import functools

from load_ours import batches, grow, write
from load_task import run

if __name__ == "__main__":
    run(write=write, batches=functools.partial(batches, kind="sequential"), grow=grow)
