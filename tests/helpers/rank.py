"""What a rank of `tests.helpers.ranks` does, in its own process: join the others, run the code, and how that code trains, watches and dies."""

import os
import pickle
import traceback

import torch
import torch.distributed as dist

from minimind_data.options import options_from
from minimind_train.parallel.world import RankPlace, World, process_group
from minimind_train.run import entry
from minimind_train.run.options import PHASE_OPTIONS
from minimind_train.training import loop


def train(world, options, *, command="pretrain", given=None):
    """Begin a run of these options as one of its ranks; with `given`, resume the one in their folder, what is given changed."""
    if given is None:
        return entry.begin(options_from(PHASE_OPTIONS[command], options), _say, world=world)
    return entry.resume(options["run"], given, say=_say, world=world)


def before_each_step(call, patch=setattr):
    """Call `call(batch)` whenever a step of the loop is about to be made of a batch; `patch` puts the watch in its place."""
    original = loop.take_step

    def watched(learner, batch, **keywords):
        call(batch)
        return original(learner, batch, **keywords)

    patch(loop, "take_step", watched)


def run(*, source, rank, size, meeting, names):
    """Be one of `size` ranks that run this code; its report goes into a file beside the one at which they meet."""
    report = {}

    def leave():
        """End as one who is killed, but for the report."""
        with meeting.with_suffix(f".{rank}").open("wb") as file:
            pickle.dump(report, file)
        os._exit(0)

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    world = World(RankPlace(rank=rank, size=size, local_rank=rank, local_size=size))
    known = {"os": os, "torch": torch, "dist": dist, "train": train, "before_each_step": before_each_step}
    known |= {"rank": rank, "size": size, "world": world, "report": report, "leave": leave}
    try:
        with process_group(world, dist.FileStore(str(meeting), size) if size > 1 else None):
            exec(compile(source, "<rank>", "exec"), known | names)  # noqa: S102 - what a rank is for
    except BaseException:  # noqa: BLE001 - whatever it is, the test is told
        traceback.print_exc()
        report = traceback.format_exc()
    leave()


def _say(line):
    """Take a line that nobody reads."""
