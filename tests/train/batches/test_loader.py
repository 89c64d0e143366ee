"""StepLoader: the samples of each step, and of each resumed run, are those that the order says, each once. WindowDataset."""

import threading
import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from minimind_data.windows import read_ahead
from minimind_train.batches.steps import BatchDivision
from minimind_train.batches.torch_loader import ResumableBatchSampler, WindowDataset
from minimind_train.order.sample_order import SampleOrder
from minimind_train.order.skips import Skips
from tests.helpers.loops import step_loader

SEQ_LEN = 4


class FakeWindows:
    """Windows whose tokens are their own number, so that a failure can be read; window k has k % 3 targets that are ignored."""

    shards = None
    layout = "concat"
    seq_len = SEQ_LEN
    unused_tokens = 0

    def __init__(self, n, *, labels=False, fails_at=None, delay=0.0):
        self.n, self.labels, self.fails_at, self.delay = n, labels, fails_at, delay
        self.fetches = 0

    def __len__(self):
        return self.n

    shard_sets = ()

    def will_need(self, windows):
        pass

    def fetch(self, windows):
        self.fetches += 1
        time.sleep(self.delay)
        if self.fails_at is not None and self.fails_at in windows:
            raise OSError(f"window {self.fails_at} cannot be read")
        assert windows.dtype == np.int64
        input_ids = np.repeat(windows[:, None], SEQ_LEN, axis=1)
        targets = input_ids + 1
        targets[np.arange(SEQ_LEN) < windows[:, None] % 3] = -100
        return {"input_ids": input_ids, "labels" if self.labels else "targets": targets}


def order_of(n, seed=5, kind="shuffled"):
    return SampleOrder(num_windows=n, seed=seed, kind=kind)


def windows_in(order, start, stop):
    return order.windows(np.arange(start, stop)).tolist()


def numbers(batch):
    return batch["input_ids"][:, 0].tolist()


def seen_by(loader):
    return [window for step in loader for batch in step.micro_batches for window in numbers(batch)]


def step_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("step-loader")]


# StepLoader


@pytest.mark.parametrize("kind", ["shuffled", "sequential"])
@pytest.mark.parametrize(
    ("start", "stop", "global_batch"),
    [(0, 46, 8), (5, 69, 8), (22, 23, 8), (20, 30, 1), (7, 7, 4), (0, 23, 50), (3, 4000, 1900)],
)
def test_steps_are_the_order_across_epochs_and_a_short_last_one(kind, start, stop, global_batch):
    order = order_of(23, kind=kind)
    with step_loader(
        FakeWindows(23), order, start=start, stop=stop, global_batch=global_batch, micro_batch=3
    ) as loader:
        steps = list(loader)
    assert len(steps) == len(loader)
    position = start
    for step in steps:
        assert (step.start, step.stop) == (position, min(position + global_batch, stop))
        assert [w for batch in step.micro_batches for w in numbers(batch)] == windows_in(
            order, step.start, step.stop
        )
        position = step.stop
    assert position == stop


def test_a_micro_batch_is_int64_of_the_asked_size_and_targets_are_counted():
    with step_loader(
        FakeWindows(23), order_of(23), start=0, stop=10, global_batch=10, micro_batch=4
    ) as loader:
        (step,) = loader
    assert [tuple(batch["input_ids"].shape) for batch in step.micro_batches] == [
        (4, SEQ_LEN),
        (4, SEQ_LEN),
        (2, SEQ_LEN),
    ]
    for batch in step.micro_batches:
        assert batch["input_ids"].dtype == batch["targets"].dtype == torch.int64
    assert step.num_targets == sum(int((batch["targets"] != -100).sum()) for batch in step.micro_batches)
    assert type(step.num_targets) is int


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro_batch", [1, 3, 100])
def test_a_step_has_the_same_samples_for_any_ranks_and_micro_batch(world_size, micro_batch):
    order, start, stop, global_batch = order_of(23), 4, 61, 9
    ranks = [
        list(
            step_loader(
                FakeWindows(23),
                order,
                start=start,
                stop=stop,
                global_batch=global_batch,
                micro_batch=micro_batch,
                rank=rank,
                world_size=world_size,
            )
        )
        for rank in range(world_size)
    ]
    whole = list(
        step_loader(
            FakeWindows(23), order, start=start, stop=stop, global_batch=global_batch, micro_batch=100
        )
    )
    assert {len(steps) for steps in ranks} == {len(whole)}
    for shares, step in zip(zip(*ranks, strict=True), whole, strict=True):
        expected = windows_in(order, step.start, step.stop)
        for rank, share in enumerate(shares):
            assert (share.start, share.stop) == (step.start, step.stop)
            assert [w for batch in share.micro_batches for w in numbers(batch)] == expected[rank::world_size]
        assert sum(share.num_targets for share in shares) == step.num_targets
        assert sum(share.num_terms for share in shares) == step.num_terms == step.num_targets
        assert sum(share.num_windows for share in shares) == step.num_windows == len(expected)
        assert sum(share.num_tokens for share in shares) == step.num_tokens == SEQ_LEN * len(expected)


def test_a_run_goes_on_from_every_position():
    order, total = order_of(7), 30
    for start in range(total + 1):
        for global_batch in (1, 4):
            loader = step_loader(
                FakeWindows(7), order, start=start, stop=total, global_batch=global_batch, micro_batch=2
            )
            assert seen_by(loader) == windows_in(order, start, total)


def test_a_run_stopped_and_resumed_with_other_batches_sees_what_an_unbroken_one_sees():
    order, position, seen = order_of(11), 0, []
    random = np.random.default_rng(0)
    while position < 60:
        loader = step_loader(
            FakeWindows(11),
            order,
            start=position,
            stop=60,
            global_batch=int(random.integers(1, 14)),
            micro_batch=int(random.integers(1, 5)),
            prefetch=int(random.integers(1, 4)),
        )
        for num_steps, step in enumerate(loader):
            seen += [w for batch in step.micro_batches for w in numbers(batch)]
            position = step.stop
            if num_steps == 1:
                break
    assert seen == windows_in(order, 0, 60)


@pytest.mark.parametrize(("options", "prefetch"), [({}, 2), ({"prefetch": 2}, 2), ({"prefetch": 4}, 4)])
def test_reads_ahead_no_further_than_asked_and_each_step_once(options, prefetch):
    windows = FakeWindows(100)
    with step_loader(
        windows, order_of(100), start=0, stop=100, global_batch=5, micro_batch=5, **options
    ) as loader:
        iterator = iter(loader)
        assert windows.fetches == 0
        next(iterator)
        deadline = time.monotonic() + 5
        while windows.fetches < prefetch + 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert windows.fetches == prefetch + 1
        assert len(list(iterator)) == 19
    assert windows.fetches == 20


def test_a_failure_in_the_thread_is_raised_at_its_step_and_ends_the_thread():
    order = order_of(40)
    bad = order.window(17)[1]
    seen = []
    with (
        step_loader(
            FakeWindows(40, fails_at=bad), order, start=0, stop=40, global_batch=5, micro_batch=5
        ) as loader,
        pytest.raises(OSError, match=f"window {bad} cannot be read"),
    ):
        seen.extend(step.stop for step in loader)
    assert seen == [5, 10, 15]
    assert not step_threads()


def make_slow_loader():
    return step_loader(
        FakeWindows(40, delay=0.01),
        order_of(40),
        start=0,
        stop=4_000,
        global_batch=4,
        micro_batch=4,
        prefetch=3,
    )


def test_no_thread_is_left_when_the_loop_is_left():
    loader = make_slow_loader()
    for _ in loader:
        assert step_threads()
        break
    assert not step_threads()

    with make_slow_loader() as loader:
        iterator = iter(loader)  # held, so only the with block can end it
        next(iterator)
    assert not step_threads()

    def fail():
        with make_slow_loader() as loader:
            for _ in loader:
                raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not step_threads()

    loader = make_slow_loader()
    first = iter(loader)
    next(first)
    second = iter(loader)
    assert next(second).start == 0
    assert len(step_threads()) == 1
    assert list(first) == []
    loader.close()
    loader.close()
    assert not step_threads()


def test_step_loader_refuses_what_makes_no_sense():
    def make(windows=None, order=None, **changes):
        options = {"start": 0, "stop": 10, "global_batch": 4, "micro_batch": 2} | changes
        return step_loader(windows or FakeWindows(10), order or order_of(10), **options)

    for changes, message in (
        ({"global_batch": 0}, "at least one sample"),
        ({"world_size": 5}, "one sample for each of 5 ranks, not 4"),
        ({"rank": 1}, "rank must be"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
        ({"prefetch": 0}, "prefetch must be at least 1"),
        ({"start": 11}, "not from 11 to 10"),
        ({"start": -1}, "not from -1 to 10"),
        ({"order": order_of(9)}, "order is one of 9 windows, the dataset has 10"),
        ({"windows": FakeWindows(10, labels=True)}, "labels=False"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**changes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_tensors_arrive():
    order = order_of(23)
    with step_loader(
        FakeWindows(23), order, start=0, stop=46, global_batch=8, micro_batch=3, device="cuda"
    ) as loader:
        steps = list(loader)
    assert all(batch["input_ids"].is_cuda for step in steps for batch in step.micro_batches)
    assert [w for step in steps for batch in step.micro_batches for w in numbers(batch)] == windows_in(
        order, 0, 46
    )


# WindowDataset


def test_a_dataset_gives_windows_one_by_one_and_in_batches():
    dataset = WindowDataset(FakeWindows(6))
    assert len(dataset) == 6
    assert dataset[4]["input_ids"].tolist() == [4] * SEQ_LEN
    assert dataset[4]["targets"].tolist() == [-100, 5, 5, 5]
    assert [sample["input_ids"][0].item() for sample in dataset.__getitems__([5, 0, 5])] == [5, 0, 5]
    assert dataset.__getitems__([]) == []
    assert [sample["input_ids"][0].item() for sample in dataset] == list(range(6))  # ends by IndexError
    for window in (-1, 6):
        with pytest.raises(IndexError, match="there are 6"):
            dataset[window]


def test_a_batch_is_one_fetch():
    windows = FakeWindows(20)
    batches = list(DataLoader(WindowDataset(windows), batch_sampler=ResumableBatchSampler(order_of(20), 5)))
    assert windows.fetches == len(batches) == 4


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_that_takes_whole_batches_gives_the_same(num_workers):
    dataset = WindowDataset(FakeWindows(20))
    rows = DataLoader(dataset, batch_sampler=ResumableBatchSampler(order_of(20), 6), num_workers=num_workers)
    whole = DataLoader(
        dataset,
        sampler=ResumableBatchSampler(order_of(20), 6),
        batch_size=None,
        num_workers=num_workers,
    )
    for one, other in zip(rows, whole, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    for wrong in (-1, 20):
        with pytest.raises(IndexError, match="there are 20"):
            dataset[[3, wrong]]
    assert dataset[[19, 0]]["input_ids"][:, 0].tolist() == [19, 0]
    assert dataset[[]]["input_ids"].shape == (0, SEQ_LEN)


def test_steps_of_a_rank_are_asked_for_as_far_ahead_as_they_are_read(monkeypatch):
    windows, asked = FakeWindows(10_000), []
    monkeypatch.setattr(windows, "will_need", lambda batch: asked.append(batch.tolist()), raising=False)
    monkeypatch.setattr(read_ahead, "_disk_reads", lambda: windows.fetches)  # every batch from the disk
    order = SampleOrder(num_windows=10_000, seed=3)
    loader = step_loader(
        windows,
        order,
        start=64,
        stop=9_000,
        global_batch=64,
        micro_batch=32,
        rank=1,
        world_size=2,
        prefetch=1,
    )
    steps = [step for _, step in zip(range(60), loader, strict=False)]
    loader.close()
    own, later = asked[1:117:2], asked[2:118:2]  # the first step is asked for alone
    assert own[0] == torch.cat([batch["input_ids"][:, 0] for batch in steps[1].micro_batches]).tolist()
    assert later[0] == own[1024 // 32]
    assert later[: len(own) - 32] == own[32:]


def test_a_long_run_remembers_no_more_than_the_steps_around_it():
    with step_loader(
        FakeWindows(5000), order_of(5000), start=0, stop=5000, global_batch=512, micro_batch=512
    ) as loader:
        numbers = [sorted(loader._plans) for _ in loader]
    assert max(map(len, numbers)) == 2
    assert all(plans == list(range(plans[0], plans[0] + len(plans))) for plans in numbers)


def test_a_loop_that_is_left_waits_for_the_step_that_is_being_read_and_for_no_other(monkeypatch):
    windows, left = FakeWindows(40), threading.Event()
    fetch = windows.fetch

    def fetch_late(numbers):
        if windows.fetches == 1:
            left.wait(30)
            time.sleep(0.5)
        return fetch(numbers)

    monkeypatch.setattr(windows, "fetch", fetch_late)
    loader = step_loader(windows, order_of(40), start=0, stop=40, global_batch=4, micro_batch=4, prefetch=3)
    next(steps := iter(loader))
    left.set()
    loader.close()
    assert windows.fetches == 2
    assert list(steps) == []


@pytest.mark.parametrize("stop", [2048, 2000, 64])
def test_nothing_is_asked_for_behind_the_last_step(monkeypatch, stop):
    windows, asked = FakeWindows(3000), []
    monkeypatch.setattr(windows, "will_need", lambda batch: asked.append(batch.tolist()))
    monkeypatch.setattr(read_ahead, "_disk_reads", lambda: windows.fetches)  # every batch from the disk
    order = order_of(3000)
    loader = step_loader(windows, order, start=0, stop=stop, global_batch=64, micro_batch=64)
    assert seen_by(loader) == windows_in(order, 0, stop)
    steps = [windows_in(order, start, min(start + 64, stop)) for start in range(0, stop, 64)]
    assert all(batch in (*steps, []) for batch in asked)
    assert all(steps.count(batch) == 1 for batch in asked if batch)


def test_positions_of_a_step_leave_out_what_is_skipped():
    loader = step_loader(
        FakeWindows(40),
        order_of(40),
        start=3,
        stop=40,
        global_batch=8,
        micro_batch=4,
        rank=1,
        world_size=2,
        skips=Skips.of(["7:10"]),
    )
    first, second, *_ = loader
    assert loader.positions(first).tolist() == [3, 4, 5, 6, 10, 11, 12, 13]
    assert loader.positions(second).tolist() == list(range(14, 22))


def test_a_step_is_not_divided_where_nothing_is_said():
    division = BatchDivision(global_batch=1, micro_batch=1)
    assert (division.rank, division.world_size) == (0, 1)
