"""Ranks for tests: processes forked from one that has imported what they need, which meet at a file and run a piece of code.

The code is a string, since what stands in a test module cannot be imported by another process. It finds `rank`, `size`, `world`, joined, what it
was given by name, and everything that is public in `tests.helpers.rank`, which is for it: `train(world, options)` begins or resumes a run,
`before_each_step` watches one, `leave()` dies. What it puts into `report` comes back, also from a rank that has left.
"""

import multiprocessing
import pickle
import textwrap
from pathlib import Path
from tempfile import TemporaryDirectory

_PRELOADED = [
    "minimind_train.run.entry",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
]
_ENTRY = f"import sys; sys.path.append({str(Path(__file__).parents[2])!r}); from tests.helpers import rank; rank.run(**arguments)"
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOADED)

TRAIN = 'report["outcome"] = train(world, options)'
"""Code of a rank that begins a run of `options`."""


def run_ranks(source: str, size: int, *, timeout: float = 240, **names) -> list[dict]:
    """Run a piece of code on `size` ranks at once, and return the report of each."""
    with TemporaryDirectory() as folder:
        meeting = Path(folder) / "meeting"
        arguments = {"source": textwrap.dedent(source), "size": size, "meeting": meeting, "names": names}
        processes = [
            _context.Process(target=exec, args=(_ENTRY, {"arguments": {**arguments, "rank": rank}}))
            for rank in range(size)
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
        reports = [pickle.loads(meeting.with_suffix(f".{rank}").read_bytes()) for rank in range(size)]
    for rank, report in enumerate(reports):
        assert isinstance(report, dict), f"rank {rank}: {report}"
    return reports
