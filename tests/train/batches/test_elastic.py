"""The same samples in the same steps, however a run is cut up: ranks, micro-batches, workers, stops, and changes on the way.

What a run saw is a list of (step, position, dataset, window). It is held against a walk that knows no arithmetic: position after
position, each part counting its own windows.
"""

import random
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import pytest
from torch.utils.data import DataLoader

from minimind_data.dataset.shard_set import ShardSet
from minimind_data.windows.opening import open_windows
from minimind_train.batches.torch_loader import ResumableBatchSampler, WindowDataset
from minimind_train.order.mixture import MixtureOrder, MixtureStage
from minimind_train.order.sample_order import SampleOrder
from minimind_train.order.skips import Skips
from minimind_train.run import entry
from minimind_train.run.entry import resume
from minimind_train.training import loop
from tests.helpers.loops import step_loader
from tests.helpers.runs import Said, config_of, stop_after

SIZES = {"en": 61, "math": 7, "zh": 150}
WORLD_SIZES = (1, 2, 3, 4, 8)


class NumberedWindows:
    """Windows that hold their own number."""

    labels = False

    def __len__(self):
        return sum(SIZES.values())

    shard_sets = ()

    def will_need(self, windows):
        pass

    def fetch(self, windows):
        return {"input_ids": windows[:, None], "targets": windows[:, None]}


@dataclass
class Leg:
    """What holds from one start of the run to its end: what must not matter, and what may change the samples on purpose."""

    num_steps: int
    world_size: int = 1
    micro_batch: int = 8
    workers: int | None = None
    """Of a DataLoader; None is our own loader."""
    saved: int | None = None
    """Of the steps, those that a crash at its end leaves; all by default."""
    global_batch: int | None = None
    shares: tuple[int, ...] | None = None
    skips: list[str] = field(default_factory=list)


def first_order(block=1):
    stages = [MixtureStage(start=0, shares=(2, 1, 4), taken=(0, 0, 0))]
    return MixtureOrder.of(SIZES, seed=11, block=block, stages=stages)


def walk(legs, block=1):
    """What must be seen, found by counting."""
    order, batch, left_out = first_order(block), 8, []
    position, step, counts, seen = 0, 0, [0, 0, 0], []
    for leg in legs:
        batch = leg.global_batch or batch
        left_out += [range(*map(int, text.split(":"))) for text in leg.skips]
        if leg.shares:
            order = order.reweighted(position, leg.shares)
        for _ in range(leg.num_steps if leg.saved is None else leg.saved):
            step += 1
            taken = 0
            while taken < batch:
                part = order.window(position).part
                own = order.parts[part]
                window = int(own.windows(np.array([counts[part]]))[0])
                counts[part] += 1
                if not any(position in one for one in left_out):
                    seen.append((step, position, order.names[part], window))
                    taken += 1
                position += 1
    return seen


def named(order, step, positions, numbers):
    parts = np.searchsorted(order.starts, numbers, side="right") - 1
    return [
        (step, int(position), order.names[part], int(number - order.starts[part]))
        for position, part, number in zip(positions, parts, numbers, strict=True)
    ]


def batches_of(leg, order, skips, position, batch, rank):
    """Yield (position after, windows) of the steps of one rank."""
    share = {"rank": rank, "world_size": leg.world_size, "skips": skips, "start": position, "stop": 10**6}
    if leg.workers is None:
        loader = step_loader(
            NumberedWindows(), order, global_batch=batch, micro_batch=leg.micro_batch, **share
        )
        for step in islice(loader, leg.num_steps):
            assert all(len(micro["input_ids"]) <= leg.micro_batch for micro in step.micro_batches)
            yield step.stop, [int(n) for micro in step.micro_batches for n in micro["input_ids"][:, 0]]
        return
    sampler = ResumableBatchSampler(order, batch, drop_last=True, **share)
    loader = DataLoader(WindowDataset(NumberedWindows()), batch_sampler=sampler, num_workers=leg.workers)
    for done, got in enumerate(islice(loader, leg.num_steps), 1):
        yield sampler.state_after(done)["position"], got["input_ids"][:, 0].tolist()


def run(legs, block=1):
    """What is seen when all of that happens."""
    order, batch, skips = first_order(block), 8, Skips()
    position, seen, redone = 0, [], {}
    for leg in legs:
        batch = leg.global_batch or batch
        skips = Skips.of([*skips.as_texts(), *leg.skips])
        if leg.shares:
            order = order.reweighted(position, leg.shares)
        if leg.global_batch or leg.shares or leg.skips:
            redone = {}
        step = seen[-1][0] if seen else 0
        ranks = [list(batches_of(leg, order, skips, position, batch, rank)) for rank in range(leg.world_size)]
        for number, shares in enumerate(zip(*ranks, strict=True), 1):
            (stop,) = {stop for stop, _ in shares}
            first = skips.kept_before(position)
            numbers = np.empty(batch, np.int64)
            for rank, (_, windows) in enumerate(shares):
                numbers[rank :: leg.world_size] = windows
            these = named(order, step + number, skips.kept(np.arange(first, first + batch)), numbers)
            assert redone.setdefault(step + number, these) == these  # a crash undid it, and here it is again
            if leg.saved is None or number <= leg.saved:
                seen += these
                position_saved = stop
            position = stop
        position = position_saved if seen else 0
    return seen


@pytest.mark.parametrize("block", [1, 5])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("workers", [None, 0])
def test_any_world_size_and_micro_batch_sees_what_one_process_sees(world_size, workers, block):
    expected = walk([Leg(30)], block)
    for micro_batch in (1, 3, 8) if workers is None else (8,):
        leg = Leg(30, world_size=world_size, micro_batch=micro_batch, workers=workers)
        assert run([leg], block) == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_sees_what_one_process_sees(workers):
    legs = [Leg(5, workers=workers), Leg(4, world_size=2, workers=workers, saved=2), Leg(9, workers=workers)]
    assert run(legs) == walk([Leg(16)])


def random_legs(source, *, changes):
    legs = []
    for _ in range(source.randint(2, 6)):
        num_steps = source.randint(1, 7)
        leg = Leg(
            num_steps,
            world_size=source.choice(WORLD_SIZES),
            micro_batch=source.randint(1, 9),
            workers=source.choice([None, None, 0]),
            saved=source.choice([None, source.randint(1, num_steps)]),
        )
        if changes and source.random() < 0.5:
            leg.global_batch = source.randint(8, 31)
        if changes and source.random() < 0.4:
            leg.shares = source.choice([(1, 0, 0), (1, 1, 1), (5, 0, 3), (17, 40, 3)])
        if changes and source.random() < 0.4:
            first = source.randint(0, 400)
            leg.skips = [f"{first}:{first + source.randint(1, 60)}"]
        legs.append(leg)
    return legs


@pytest.mark.parametrize("seed", range(25))
def test_stopped_and_resumed_anywhere_on_other_ranks_it_is_the_uninterrupted_run(seed):
    legs = random_legs(random.Random(seed), changes=False)
    total = sum(leg.num_steps if leg.saved is None else leg.saved for leg in legs)
    assert run(legs) == run([Leg(total)]) == walk([Leg(total)])


@pytest.mark.parametrize("seed", range(60))
def test_batches_weights_and_left_out_ranges_change_on_the_way_and_no_sample_is_lost_or_twice(seed):
    legs = random_legs(random.Random(seed), changes=True)
    seen = run(legs, block=1 + seed % 4)
    assert seen == walk(legs, block=1 + seed % 4)
    positions = [position for _, position, _, _ in seen]
    assert positions == sorted(set(positions))


# The whole program: what the loop was given, told by the tokens themselves.


@pytest.fixture
def seen_by_loop(monkeypatch, small_dataset, other_dataset):
    """A list that fills with (step, part, window) of all that the loop learns, in order."""
    numbers = {}
    for part, folder in (("a", small_dataset), ("b", other_dataset)):
        windows = open_windows(ShardSet.open(folder), layout="concat", seq_len=16)
        rows = windows.fetch(np.arange(len(windows)))["input_ids"]
        numbers |= {row.tobytes(): (part, number) for number, row in enumerate(rows)}
        assert len(numbers) >= len(windows)
    seen, steps, original, rate = [], [], loop.take_step, loop.learning_rate

    def noting(step, *arguments):
        steps.append(step)
        return rate(step, *arguments)

    def recording(learner, batch, *arguments, **keywords):
        for micro_batch in batch.micro_batches:
            seen.extend((steps[-1], *numbers[row.numpy().tobytes()]) for row in micro_batch["input_ids"])
        return original(learner, batch, *arguments, **keywords)

    monkeypatch.setattr(loop, "learning_rate", noting)
    monkeypatch.setattr(loop, "take_step", recording)
    return seen


def expected_steps(order, batches, *, start=0, step=0):
    """(step, part, window) of steps with so many samples each."""
    told = []
    for batch in batches:
        step += 1
        for position in range(start, start + batch):
            place = order.window(position)
            told.append((step, order.names[place.part], place.window))
        start += batch
    return told


def test_a_real_run_stopped_and_changed_on_the_way_sees_the_same_list(
    tmp_path, small_dataset, other_dataset, seen_by_loop
):
    def parts(a, b):
        return (f"a={small_dataset}:{a}", f"b={other_dataset}:{b}")

    run_folder = tmp_path / "run"
    sizes = {
        name: len(open_windows(ShardSet.open(folder), layout="concat", seq_len=16))
        for name, folder in (("a", small_dataset), ("b", other_dataset))
    }
    order = MixtureOrder.of(sizes, seed=42, stages=[MixtureStage(start=0, shares=(3, 1), taken=(0, 0))])
    steps = {"allow_change": {"steps", "global_batch", "weights"}, "say": Said()}

    entry.begin(config_of(run_folder, parts(3, 1), steps=4, save_every=1, keep=0), Said())
    stop_after(run_folder, 3)
    del seen_by_loop[3 * 8 :]
    resume(run_folder, {"steps": 5, "micro_batch": 3}, **steps)  # more steps are wanted than at first
    resume(run_folder, {"steps": 7, "global_batch": 5, "micro_batch": 5}, **steps)
    resume(run_folder, {"steps": 9, "shards": parts(1, 2), "global_batch": 7}, **steps)
    stop_after(run_folder, 8)
    del seen_by_loop[5 * 8 + 2 * 5 + 7 :]
    resume(run_folder, {"steps": 12, "micro_batch": 1}, **steps)
    order = order.reweighted(50, (1, 2))
    assert seen_by_loop == expected_steps(order, [8] * 5 + [5] * 2 + [7] * 5)


def test_how_many_steps_are_wanted_changes_no_sample(tmp_path, small_dataset, seen_by_loop):
    size = len(open_windows(ShardSet.open(small_dataset), layout="concat", seq_len=16))
    order = SampleOrder(num_windows=size, seed=42)
    for number, wanted in enumerate(({"steps": 3}, {"steps": 20}, {"steps": None, "epochs": 1})):
        seen_by_loop.clear()
        entry.begin(config_of(tmp_path / str(number), small_dataset, save_every=0, **wanted), Said())
        windows = [window for _, _, window in seen_by_loop]
        assert windows == order.windows(np.arange(len(windows))).tolist()
