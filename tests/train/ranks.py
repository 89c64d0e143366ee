"""Ranks for tests: processes forked from one that has imported what they need, which meet at a file and run a piece of code.

The code finds `world`, joined, and what it was given by name; what it puts into `told` comes back, also where it ends itself by
`leave()`. It is a string because tests are
no package that another process could import.
"""

import multiprocessing
import pickle
import textwrap
from pathlib import Path
from tempfile import TemporaryDirectory

_PRELOADED = [
    "minimind_train.run.phases",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
]
_PRELUDE = """
import os, pickle, sys, traceback
import torch, torch.distributed as dist
from minimind_train.parallel.world import Place, World, process_group

def leave():  # as one who is killed, but for what it has told
    with open(f"{meeting}.{rank}", "wb") as file:
        pickle.dump(told, file)
    os._exit(0)

torch.set_num_threads(1)
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
world, told = World(Place(rank=rank, size=size, local_rank=rank, local_size=size)), {}
try:
    with process_group(world, dist.FileStore(meeting, size) if size > 1 else None):
        exec(compile(source, "<rank>", "exec"), globals())
except BaseException:
    traceback.print_exc()
    told = traceback.format_exc()
leave()
"""
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOADED)


def run_ranks(source: str, size: int, *, timeout: float = 240, **given) -> list[dict]:
    """Run a piece of code on `size` ranks at once, and return what each has told."""
    with TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        names = {"source": textwrap.dedent(source), "size": size, "meeting": meeting, **given}
        processes = [
            _context.Process(target=exec, args=(_PRELUDE, {"rank": rank, **names})) for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join(timeout)
                assert process.exitcode == 0, f"{process} still runs, or died"
        finally:
            for process in processes:
                process.kill()
        told = [pickle.loads(Path(f"{meeting}.{rank}").read_bytes()) for rank in range(size)]
    for rank, one in enumerate(told):
        assert isinstance(one, dict), f"rank {rank}: {one}"
    return told
