"""ResumableBatchSampler: exactly the rest of the order, from any position, in anybody's DataLoader."""

import copy
import json
import pickle
from itertools import chain, islice

import numpy as np
import pytest
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from minimind_data.errors import UserError
from minimind_data.windows.opening import open_windows
from minimind_train.batches.torch_loader import ResumableBatchSampler, WindowDataset
from minimind_train.order.mixture import MixtureOrder, MixtureStage
from minimind_train.order.sample_order import SampleOrder
from tests.helpers.datasets import BOS, EOS, write_dataset
from tests.helpers.loops import step_loader

SEQ_LEN = 4
NUM_WINDOWS = 30

# torchdata 0.11 calls a function of torch that newer versions deprecate.
torchdata = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Thirty windows in two shards. Every token is its own number in the stream plus 10, but for the ends of the shards."""
    tokens = np.arange(NUM_WINDOWS * SEQ_LEN + 1) + 10
    shards = np.split(tokens, [50])
    for shard in shards:
        shard[0], shard[-1] = BOS, EOS
    dataset = write_dataset(
        tmp_path_factory.mktemp("dataset") / "data", [[shard] for shard in shards], vocab_size=200
    )
    return WindowDataset(open_windows(dataset, layout="concat", seq_len=SEQ_LEN))


def order_of(n, seed=5, kind="shuffled"):
    return SampleOrder(num_windows=n, seed=seed, kind=kind)


def windows_in(order, start, stop):
    return order.windows(np.arange(start, stop)).tolist()


def flat(batches):
    return list(chain.from_iterable(batches))


def numbers(batch):
    assert (batch["input_ids"][:, 1:] == batch["targets"][:, :-1]).all()
    return ((batch["input_ids"][:, 3] - 10) // SEQ_LEN).tolist()  # no shard ends there


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_ranks_partition_every_list(world_size):
    order = order_of(50)
    ranks = [
        list(ResumableBatchSampler(order, 10, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    for number, shares in enumerate(zip(*ranks, strict=True)):
        expected = windows_in(order, 10 * number, 10 * number + 10)
        assert [share == expected[rank::world_size] for rank, share in enumerate(shares)] == [
            True
        ] * world_size


def test_an_iteration_is_an_epoch_and_the_next_is_the_next():
    order = order_of(10)
    sampler = ResumableBatchSampler(order, 4)
    for epoch in range(3):
        assert sampler.epoch == epoch
        assert len(sampler) == 3
        batches = list(sampler)
        assert [len(batch) for batch in batches] == [4, 4, 2]
        assert flat(batches) == windows_in(order, 10 * epoch, 10 * epoch + 10)
    assert sampler.state_dict()["position"] == 30


def test_with_a_stop_it_runs_through_the_epochs():
    order = order_of(10)
    sampler = ResumableBatchSampler(order, 4, start=3, stop=28)
    assert len(sampler) == 7
    assert list(sampler) == [
        windows_in(order, position, min(position + 4, 28)) for position in range(3, 28, 4)
    ]
    assert list(sampler) == []
    assert len(sampler) == 0


def test_an_iteration_that_is_broken_off_begins_again():
    sampler = ResumableBatchSampler(order_of(10), 4)
    first = next(iter(sampler))
    assert next(iter(sampler)) == first
    assert sampler.epoch == 0


def test_drop_last_leaves_out_the_short_batch_and_goes_on_with_the_next_epoch():
    order = order_of(10)
    sampler = ResumableBatchSampler(order, 4, drop_last=True)
    assert len(sampler) == 2
    assert flat(sampler) == windows_in(order, 0, 8)
    assert flat(sampler) == windows_in(order, 10, 18)
    assert sampler.state_after(2)["position"] == sampler.state_dict()["position"] == 20


def test_resumes_from_every_batch_with_the_same_and_another_batch_size():
    order = order_of(23)
    for taken in range(12):
        sampler = ResumableBatchSampler(order, 4)
        before: list[int] = []
        while taken:  # 6 batches an epoch
            for batch in sampler:
                before += batch
                taken -= 1  # noqa: PLW2901
                if not taken:
                    break
        state = sampler.state_dict()
        for global_batch in (4, 7):
            other = ResumableBatchSampler(order, global_batch)
            other.load_state_dict(state)
            assert other.epoch == len(before) // 23
            rest = [window for _ in range(other.epoch, 3) for batch in other for window in batch]
            assert before + rest == windows_in(order, 0, 69)


def test_a_run_that_was_at_its_end_is_there_again():
    done = ResumableBatchSampler(order_of(10), 4, stop=8)
    assert len(list(done)) == 2
    again = ResumableBatchSampler(order_of(10), 4, stop=8)
    again.load_state_dict(done.state_dict())
    assert list(again) == []


def test_an_iteration_goes_on_where_another_was_also_in_a_later_epoch():
    order = order_of(10)
    sampler = ResumableBatchSampler(order, 4)
    assert len(list(sampler)) == 3
    second = iter(sampler)
    next(second)
    other = iter(ResumableBatchSampler(order, 4))
    other.load_state_dict(second.state_dict())
    assert len(other) == 2
    assert flat(other) == windows_in(order, 14, 20)


@pytest.mark.parametrize(
    ("changed", "sides"),
    [
        ({"n": 24}, "num_windows is 23 in the saved state, 24 here"),
        ({"n": 23, "seed": 6}, "seed is 5 in the saved state, 6 here"),
        ({"n": 23, "kind": "sequential"}, "order is shuffled in the saved state, sequential here"),
    ],
)
def test_a_position_in_another_order_is_refused_with_both_sides(changed, sides):
    state = ResumableBatchSampler(order_of(23), 4).state_dict()
    with pytest.raises(UserError, match=sides):
        ResumableBatchSampler(order_of(**changed), 4).load_state_dict(state)


def test_sampler_refuses_what_makes_no_sense():
    order = order_of(10)
    for arguments, message in (
        ({"global_batch": 0}, "at least one sample"),
        ({"global_batch": 2, "world_size": 3}, "each of 3 ranks, not 2"),
        ({"global_batch": 2, "rank": 1}, "rank must be"),
        ({"global_batch": 2, "start": -1}, "not from -1"),
        ({"global_batch": 2, "start": 5, "stop": 4}, "not from 5 to 4"),
    ):
        with pytest.raises(ValueError, match=message):
            ResumableBatchSampler(order, **arguments)
    with pytest.raises(UserError, match=r"would have 2 samples for 4 ranks; .*drop_last=True"):
        iter(ResumableBatchSampler(order, 4, world_size=4))
    with pytest.raises(ValueError, match="3 batches, so 4"):
        ResumableBatchSampler(order, 4).state_after(4)
    with pytest.raises(UserError, match="position 9 is beyond the end of this run at 8"):
        ResumableBatchSampler(order, 4, stop=8).load_state_dict(
            ResumableBatchSampler(order, 4, start=9).state_dict()
        )


# In torch's DataLoader, on a dataset on disk


def test_both_loaders_read_the_same(dataset):
    order = order_of(30)
    sampler = ResumableBatchSampler(order, 4, start=3, stop=68)
    steps = step_loader(dataset.windows, order, start=3, stop=68, global_batch=4, micro_batch=4)
    batches = [numbers(batch) for batch in DataLoader(dataset, batch_sampler=sampler)]
    assert batches == [numbers(step.micro_batches[0]) for step in steps]
    assert flat(batches) == windows_in(order, 3, 68)


def test_a_dataset_pickles_as_a_reference_to_its_folder(dataset):
    assert dataset[7]["input_ids"].tolist() == [38, 39, 40, 41]
    assert len(pickle.dumps(dataset)) < 2_000
    assert copy.deepcopy(dataset)[7]["input_ids"].tolist() == [38, 39, 40, 41]  # by the same way


def test_a_spawned_worker_opens_the_shards_for_itself(dataset):
    order = order_of(30)
    loader = DataLoader(
        dataset, batch_sampler=ResumableBatchSampler(order, 8), num_workers=1, multiprocessing_context="spawn"
    )
    assert [w for batch in loader for w in numbers(batch)] == windows_in(order, 0, 30)


@pytest.mark.parametrize(("num_workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_in_a_dataloader_every_epoch_has_every_window_once_in_order(dataset, num_workers, persistent):
    order = order_of(30)
    sampler = ResumableBatchSampler(order, 4)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        persistent_workers=persistent,
    )
    for epoch in range(2):
        assert len(loader) == 8
        assert [w for batch in loader for w in numbers(batch)] == windows_in(
            order, 30 * epoch, 30 * epoch + 30
        )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_position_in_a_dataloader_is_that_of_the_batches_consumed(dataset, num_workers):
    order = order_of(30)
    for consumed in (1, 5, 8):
        sampler = ResumableBatchSampler(order, 4)
        before, state = [], {}
        for batches_consumed, batch in enumerate(
            DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers),
            start=1,
        ):
            before += numbers(batch)
            state = sampler.state_after(batches_consumed)
            if batches_consumed == consumed:
                break
        resumed = ResumableBatchSampler(order, 4)
        resumed.load_state_dict(state)
        loader = DataLoader(dataset, batch_sampler=resumed, num_workers=num_workers)
        rest = [w for _ in range(resumed.epoch, 2) for batch in loader for w in numbers(batch)]
        assert before + rest == windows_in(order, 0, 60)


def stateful_loader(dataset, order, num_workers, every=1):
    return StatefulDataLoader(
        dataset,
        batch_sampler=ResumableBatchSampler(order, 4),
        num_workers=num_workers,
        snapshot_every_n_steps=every,
    )


@pytest.mark.parametrize(
    ("num_workers", "every", "places"), [(0, 1, range(9)), (2, 1, (0, 3, 8)), (2, 3, (1, 5))]
)
@torchdata
def test_torchdata_resumes_with_exactly_the_rest(dataset, num_workers, every, places):
    order = order_of(30)
    for place in places:
        loader = stateful_loader(dataset, order, num_workers, every)
        iterator = iter(loader)
        before = [w for _ in range(place) for w in numbers(next(iterator))]
        state = loader.state_dict()
        del iterator

        resumed = stateful_loader(dataset, order, num_workers, every)
        resumed.load_state_dict(state)
        rest = [w for batch in resumed for w in numbers(batch)]
        assert before + rest == windows_in(order, 0, 30), f"after {place} batches"
        assert [w for batch in resumed for w in numbers(batch)] == windows_in(order, 30, 60)


@torchdata
@pytest.mark.parametrize("num_workers", [0, 2])
def test_torchdata_saved_between_epochs_goes_on_with_the_next(dataset, num_workers):
    order = order_of(30)
    loader = stateful_loader(dataset, order, num_workers)
    assert len(list(loader)) == 8
    resumed = stateful_loader(dataset, order, num_workers)
    resumed.load_state_dict(loader.state_dict())
    assert [w for batch in resumed for w in numbers(batch)] == windows_in(order, 30, 60)


@torchdata
def test_torchdata_refuses_a_state_of_another_order(dataset):
    state = stateful_loader(dataset, order_of(30), 0).state_dict()
    other = stateful_loader(dataset, order_of(31), 0)
    other.load_state_dict(state)
    with pytest.raises(UserError, match="num_windows is 30 in the saved state, 31 here"):
        next(iter(other))


@torchdata
@pytest.mark.parametrize(("num_workers", "persistent"), [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("world_size", [1, 3])
def test_torchdata_stopped_again_and_again_on_every_rank_leaves_nothing_out(
    dataset, num_workers, persistent, world_size
):
    """Each stop is a new loader from the saved state, stopped in its turn, across the end of an epoch."""
    order, global_batch, stops = order_of(30), 5, (1, 2, 0, 3, 4)
    shares = []
    for rank in range(world_size):
        state, batches = None, []
        for num_batches in (*stops, None):
            loader = StatefulDataLoader(
                dataset,
                batch_sampler=ResumableBatchSampler(
                    order, global_batch, rank=rank, world_size=world_size, stop=70
                ),
                num_workers=num_workers,
                persistent_workers=persistent,
            )
            if state is not None:
                loader.load_state_dict(state)
            iterator = iter(loader)
            batches += [numbers(batch) for batch in islice(iterator, num_batches)]
            state = loader.state_dict()
            del iterator
        shares.append(batches)
    assert {len(batches) for batches in shares} == {70 // global_batch}
    union = []
    for step in zip(*shares, strict=True):
        whole = [0] * sum(map(len, step))
        for rank, batch in enumerate(step):
            whole[rank::world_size] = batch
        union += whole
    assert union == windows_in(order, 0, 70)


def test_a_mixture_has_a_position_too_and_new_shares_at_it_are_no_other_order():
    first = MixtureStage(start=0, shares=(1, 2), taken=(0, 0))
    order = MixtureOrder.of({"a": 30, "b": 21}, seed=1, stages=[first])
    sampler = ResumableBatchSampler(order, 4, stop=120)
    taken = flat(islice(iter(sampler), 6))
    state = json.loads(json.dumps(sampler.state_dict()))
    again = ResumableBatchSampler(order, 5, stop=120)
    again.load_state_dict(state)
    assert taken + flat(again) == windows_in(order, 0, 120)
    other = ResumableBatchSampler(order.reweighted(24, (2, 1)), 4, stop=120)
    other.load_state_dict(state)
    assert taken + flat(other) == windows_in(other.order, 0, 120)
    with pytest.raises(UserError, match="stages is"):
        ResumableBatchSampler(order.reweighted(23, (2, 1)), 4, stop=120).load_state_dict(state)


@pytest.mark.parametrize(("there", "here"), [(8, 1), (1, 8), (8, 4)])
def test_a_position_in_another_shuffle_block_is_refused_with_both_sides(there, here):
    state = ResumableBatchSampler(SampleOrder(num_windows=30, block=there), 4).state_dict()
    with pytest.raises(UserError, match="shuffle_block is .* in the saved state, .* here"):
        ResumableBatchSampler(SampleOrder(num_windows=30, block=here), 4).load_state_dict(state)


def test_what_they_say_of_themselves(tmp_path):
    shards = write_dataset(tmp_path / "data", [[[BOS, *range(3, 9), EOS]] * 4])
    windows = open_windows(shards, layout="pad", seq_len=8)
    dataset = WindowDataset(windows)
    assert (
        repr(dataset)
        == f"WindowDataset(PadWindows('{tmp_path / 'data'}': 4 windows of 8 tokens with targets))"
    )
    order = SampleOrder(num_windows=4, seed=7)
    sampler = ResumableBatchSampler(order, 2, rank=1, world_size=2, start=6)
    assert repr(sampler) == f"ResumableBatchSampler(at position 6, batches of 2, rank 1 of 2, {order!r})"
    assert repr(order) == "SampleOrder(num_windows=4, seed=7, kind='shuffled', block=1)"
