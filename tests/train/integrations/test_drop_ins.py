"""Drop-ins for MiniMind's scripts: its samples and its batches, each written down here again from what it publishes, plainly."""

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torch.utils.data import DistributedSampler as TorchSampler

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.errors import UserError
from minimind_data.tokenizer.places import SHIPPED, USUAL
from minimind_train.integrations.minimind import DistributedSampler, PretrainDataset, SkipBatchSampler
from minimind_train.order.sample_order import SampleOrder
from tests.helpers.runs import Said

SAMPLE = Path(__file__).parents[3] / "data" / "sample.jsonl"
NUM_LINES = 60

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(str(SHIPPED[USUAL]))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "pretrain.jsonl"
    path.write_bytes(b"".join(SAMPLE.read_bytes().splitlines(keepends=True)[:NUM_LINES]))
    return path


@pytest.fixture(scope="module")
def folder(text):
    out = text.parent / "data"
    tokenize([text], TokenizeOptions(out=out, workers=1, split_bytes=2**14))
    return out


def published_sample(tokenizer, text, max_length):
    """A sample as MiniMind's PretrainDataset describes it: BOS, what fits of the text, EOS, PAD; PAD is not learned."""
    ids = tokenizer(text, add_special_tokens=False).input_ids[: max_length - 2]
    ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    ids += [tokenizer.pad_token_id] * (max_length - len(ids))
    return ids, [-100 if one == tokenizer.pad_token_id else one for one in ids]


def published_batches(sampler, batch_size, skip_batches):
    """Batches as MiniMind's SkipBatchSampler gives them: gathered one by one, the first ones thrown away."""
    indices = list(sampler)
    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    return batches[skip_batches:]


# PretrainDataset


@pytest.mark.parametrize("max_length", [2, 3, 24, 340, 2000])
def test_every_sample_is_minimind_s(text, folder, tokenizer, max_length):
    dataset = PretrainDataset(folder, tokenizer, max_length=max_length)
    texts = [json.loads(line)["text"] for line in text.read_bytes().splitlines()]
    assert len(dataset) == len(texts) == NUM_LINES
    for number, one in enumerate(texts):
        input_ids, labels = dataset[number]
        assert (input_ids.tolist(), labels.tolist()) == published_sample(tokenizer, one, max_length)
        assert input_ids.dtype == labels.dtype == torch.int64


def test_by_default_a_sample_has_512_tokens_and_batches_are_tuples(folder, tokenizer):
    dataset = PretrainDataset(str(folder), tokenizer)
    loader = DataLoader(dataset, batch_sampler=SkipBatchSampler(list(range(7)), 4))
    shapes = [(input_ids.shape, labels.shape) for input_ids, labels in loader]
    assert shapes == [((4, 512), (4, 512)), ((3, 512), (3, 512))]
    with pytest.raises(IndexError):
        dataset[NUM_LINES]


def test_the_text_itself_is_tokenized_once(text, folder, tokenizer):
    said = Said()
    dataset = PretrainDataset(text, tokenizer, max_length=64, say=said)
    assert f"{text}: tokenized into {text}.shards" in said
    there, here = PretrainDataset(folder, tokenizer, max_length=64), dataset
    assert all(
        torch.equal(a, b)
        for number in range(NUM_LINES)
        for a, b in zip(there[number], here[number], strict=True)
    )
    before = {path: path.stat().st_mtime_ns for path in Path(f"{text}.shards").iterdir()}
    again = Said()
    PretrainDataset(text, tokenizer, max_length=32, say=again)
    assert again == []
    assert {path: path.stat().st_mtime_ns for path in Path(f"{text}.shards").iterdir()} == before
    assert not Path(f"{text}.shards.lock").exists()


def test_another_tokenizer_is_refused(folder, tokenizer, small_dataset, text):
    with pytest.raises(
        UserError,
        match=r"\(259 entries, .* and the tokenizer that was passed \(6,400 entries, .* have different tokenizers",
    ):
        PretrainDataset(small_dataset, tokenizer)
    other = transformers.AutoTokenizer.from_pretrained(str(SHIPPED[USUAL]), pad_token=tokenizer.eos_token)
    with pytest.raises(
        UserError,
        match=r"BOS 1, EOS 2, PAD 0, \w{12}…\) and the tokenizer that was passed \(6,400 entries, BOS 1, EOS 2, PAD 2\)",
    ):
        PretrainDataset(folder, other)
    nowhere = transformers.AutoTokenizer.from_pretrained(str(SHIPPED[USUAL]))
    nowhere.name_or_path = "somebody/tokenizer"
    with pytest.raises(
        UserError, match=r"comes from no folder with a tokenizer\.json; make the dataset by `tokenize` with"
    ):
        PretrainDataset(text, nowhere)


# DistributedSampler and SkipBatchSampler


@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 20))
def test_batches_of_a_list_are_minimind_s(n, batch_size, skip):
    indices = np.random.default_rng(n).permutation(n).tolist()
    sampler = SkipBatchSampler(indices, batch_size, skip)
    assert list(sampler) == published_batches(indices, batch_size, skip)
    assert len(sampler) == len(list(sampler))


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 20), st.integers(1, 5), st.booleans())
def test_batches_of_a_distributed_sampler_are_minimind_s(n, batch_size, skip, world_size, drop_last):
    for kind in (DistributedSampler, TorchSampler):
        for rank in range(world_size):
            sampler = kind(range(n), world_size, rank, seed=n, drop_last=drop_last)
            sampler.set_epoch(3)
            batches = SkipBatchSampler(sampler, batch_size, skip)
            assert list(batches) == published_batches(sampler, batch_size, skip)
            assert len(batches) == len(list(batches))


@given(st.integers(1, 60), st.integers(1, 5), st.booleans(), st.booleans())
def test_shares_are_an_epoch_of_the_order(n, world_size, shuffle, drop_last):
    order = SampleOrder(num_windows=n, seed=7, kind="shuffled" if shuffle else "sequential")
    for epoch in range(2):
        shares = []
        for rank in range(world_size):
            sampler = DistributedSampler(
                range(n), world_size, rank, shuffle=shuffle, seed=7, drop_last=drop_last
            )
            sampler.set_epoch(epoch)
            shares.append(list(sampler))
            assert len(shares[-1]) == len(sampler)
            assert len(sampler) == len(TorchSampler(range(n), world_size, rank, drop_last=drop_last))
        dealt = list(chain.from_iterable(zip(*shares, strict=True)))
        whole = order.windows(np.arange(n) + epoch * n).tolist()
        assert dealt == (whole * (world_size + 1))[: len(dealt)]


def global_batches(n, world_size, batch_size, *, skip=0, position=None):
    """What all devices learn, step by step, and the place after each step."""
    samplers = [
        SkipBatchSampler(
            DistributedSampler(range(n), world_size, rank, seed=1), batch_size, skip, position=position
        )
        for rank in range(world_size)
    ]
    (length,) = {len(sampler) for sampler in samplers}
    steps = []
    for number, shares in enumerate(zip(*samplers, strict=True), 1):
        assert len({len(share) for share in shares}) == 1  # no device waits for another that has ended
        dealt = list(chain.from_iterable(zip(*shares, strict=True)))
        (place,) = {sampler.position_after(number) for sampler in samplers}
        steps.append((dealt, place))
    assert len(steps) == length
    return steps


@pytest.mark.parametrize("n", [96, 97, 101])
def test_a_step_has_the_same_samples_on_any_number_of_devices(n):
    alone = [set(dealt) for dealt, _ in global_batches(n, 1, 24)]
    for world_size in (2, 3, 4, 8):
        steps = [set(dealt) for dealt, _ in global_batches(n, world_size, 24 // world_size)]
        assert steps[:-1] == alone[:-1]
        assert steps[-1] >= alone[-1]  # filled up, so that no device is without


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 200),
    legs=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 7), st.integers(1, 6)), min_size=1, max_size=5),
)
def test_an_epoch_goes_on_exactly_with_other_devices_and_other_batches(n, legs):
    position, seen = 0, []
    for world_size, batch_size, num_steps in legs:
        steps = global_batches(n, world_size, batch_size, position=position)[:num_steps]
        for dealt, place in steps:
            seen += dealt
            position = place
    seen += [one for dealt, _ in global_batches(n, 1, 10, position=position) for one in dealt]
    assert seen[:n] == SampleOrder(num_windows=n, seed=1).windows(np.arange(n)).tolist()
    assert len(seen) - n < 8  # of the last step, filled up


def test_skipping_batches_is_a_place_too_and_on_half_the_devices_it_is_twice_as_many():
    for skip in range(9):
        assert global_batches(97, 4, 3, skip=skip) == global_batches(97, 4, 3, position=12 * skip)
        rest = [dealt for dealt, _ in global_batches(97, 2, 3, skip=2 * skip)]
        assert (
            list(chain.from_iterable(rest))[: 97 - 12 * skip]
            == list(chain.from_iterable(dealt for dealt, _ in global_batches(97, 4, 3, skip=skip)))[
                : 97 - 12 * skip
            ]
        )


def test_a_place_in_a_trillion_is_found_at_once():
    class Endless:
        def __len__(self):
            return 10**12

    sampler = DistributedSampler(Endless(), 4, 1, seed=3)
    batches = iter(SkipBatchSampler(sampler, 8, 10**10))
    order = SampleOrder(num_windows=10**12, seed=3)
    begin = 10**10 * 8 * 4 + 1
    assert next(batches) == order.windows(np.arange(begin, begin + 32, 4)).tolist()
    assert next(batches) == order.windows(np.arange(begin + 32, begin + 64, 4)).tolist()
    assert next(iter(sampler)) == order.window(1)[1]


def test_one_device_is_the_default_and_nonsense_is_refused():
    assert (DistributedSampler(range(5)).num_replicas, DistributedSampler(range(5)).rank) == (1, 0)
    with pytest.raises(ValueError, match="rank must be from 0 to num_replicas - 1, not 2 of 2"):
        DistributedSampler(range(5), 2, 2)
    with pytest.raises(ValueError, match="no windows to put in order"):
        DistributedSampler([])
    for wrong in (
        {"batch_size": 0},
        {"batch_size": 1, "skip_batches": -1},
        {"batch_size": 1, "position": -1},
    ):
        with pytest.raises(ValueError, match="batch_size is 1 or more"):
            SkipBatchSampler([1, 2], **wrong)
