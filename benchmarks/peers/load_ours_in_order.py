"""Our own StepLoader with --order sequential: windows as they stand in the shards, beside a loader that does not shuffle."""

import functools

from load_ours import batches, grow, write
from load_task import run

if __name__ == "__main__":
    run(write=write, batches=functools.partial(batches, kind="sequential"), grow=grow)
