"""Windows of conversations and pairs: targets where the mask says so, against a plain reading of what is on disk."""

import itertools

import numpy as np
import pytest

from minimind_data.dataset.format import IGNORED
from minimind_data.errors import UserError
from minimind_data.windows import base
from minimind_data.windows.opening import open_windows
from tests.helpers.datasets import PAD, write_dataset

RNG = np.random.default_rng(11)
SHARDS = [[9, 4, 30, 2, 17, 6], [5, 5, 8, 40, 3, 12], [7, 2]]


def make(folder, kind, shards=SHARDS, mask_of=None):
    """Make a dataset whose tokens count on from 3, with any mask; return it and its sequences, (ids, mask) each."""
    following = 3

    def sequence(length):
        nonlocal following
        following += length
        mask = (RNG.random(length) < 0.5).astype(np.uint8) if mask_of is None else mask_of(length)
        return np.arange(following - length, following), mask

    sequences = [[sequence(length) for length in lengths] for lengths in shards]
    dataset = write_dataset(folder, sequences, kind=kind, source=folder.name)
    return dataset, [(ids.tolist(), mask.tolist()) for each in sequences for ids, mask in each]


def row(tokens, mask, seq_len, *, labels):
    """Return (inputs, targets) of one padded sequence, read slowly."""
    width = seq_len if labels else seq_len + 1
    tokens, mask = tokens[:width], mask[:width]
    tokens = tokens + [PAD] * (width - len(tokens))
    mask = mask + [0] * (width - len(mask))
    learned = [token if bit else IGNORED for token, bit in zip(tokens, mask, strict=True)]
    return tokens[:seq_len], learned if labels else learned[1:]


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("seq_len", [2, 5, 8, 39, 40, 64, 500])
def test_a_conversation_a_window_cut_or_padded(tmp_path, seq_len, labels):
    shards, sequences = make(tmp_path / "sft", "sft")
    windows = open_windows(shards, layout="pad", seq_len=seq_len, labels=labels)
    assert len(windows) == len(sequences)
    batch = windows.fetch(np.arange(len(windows)))
    learned = batch["labels" if labels else "targets"]
    assert batch["input_ids"].dtype == learned.dtype == np.int64
    for number, (tokens, mask) in enumerate(sequences):
        wanted = row(tokens, mask, seq_len, labels=labels)
        assert (batch["input_ids"][number].tolist(), learned[number].tolist()) == wanted
        assert windows.window_of(*windows.locate(number)) == number


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("long_documents", ["cut", "fragment", "drop"])
@pytest.mark.parametrize("seq_len", [8, 20, 64])
def test_packed_targets_are_those_of_the_mask(tmp_path, seq_len, long_documents, labels):
    shards, sequences = make(tmp_path / "sft", "sft")
    windows = open_windows(
        shards,
        layout="pack",
        seq_len=seq_len,
        labels=labels,
        documents_apart=True,
        long_documents=long_documents,
    )
    masks = {token: bit for tokens, mask in sequences for token, bit in zip(tokens, mask, strict=True)}
    firsts = {tokens[0] for tokens, _ in sequences}
    seen = set()
    for number in range(len(windows)):
        sample = {name: array[0] for name, array in windows.fetch(np.array([number])).items()}
        inputs, learned = sample["input_ids"].tolist(), sample["labels" if labels else "targets"].tolist()
        tokens = inputs if labels else inputs[1:] + learned[-1:]
        for place, (token, target) in enumerate(zip(tokens, learned, strict=True)):
            if target != IGNORED:
                assert target == token
                assert masks[token]
                seen.add(token)
            elif token not in (PAD, IGNORED) and long_documents != "fragment":
                assert not masks[token] or token in firsts, (number, place)
        starts = np.flatnonzero(sample["position_ids"] == 0)
        assert set(np.array(inputs)[starts]) <= firsts | {PAD} or long_documents == "fragment"
    if long_documents == "fragment" and not labels:
        assert seen >= {token for token, bit in masks.items() if bit} - firsts


@pytest.mark.parametrize("apart", [False, True])
def test_concat_learns_what_the_mask_marks(tmp_path, apart):
    shards, sequences = make(tmp_path / "sft", "sft")
    tokens = [token for sequence, _ in sequences for token in sequence]
    masks = [bit for _, mask in sequences for bit in mask]
    firsts = {sequence[0] for sequence, _ in sequences}
    windows = open_windows(shards, layout="concat", seq_len=13, documents_apart=apart)
    batch = windows.fetch(np.arange(len(windows)))
    for number in range(len(windows)):
        span = slice(13 * number + 1, 13 * number + 14)
        wanted = [
            token if bit and not (apart and token in firsts) else IGNORED
            for token, bit in zip(tokens[span], masks[span], strict=True)
        ]
        assert batch["targets"][number].tolist() == wanted


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("seq_len", [3, 8, 40, 200])
def test_a_pair_a_window(tmp_path, seq_len, labels):
    shards, sequences = make(tmp_path / "dpo", "dpo")
    windows = open_windows(shards, layout="pad", seq_len=seq_len, labels=labels)
    assert len(windows) == shards.num_documents == len(sequences) // 2
    learned = "labels" if labels else "targets"
    order = np.array([5, 0, 3, 6, 1, 4, 2])
    batch = windows.fetch(order)
    assert sorted(batch) == sorted(
        f"{side}_{name}" for side, name in itertools.product(("chosen", "rejected"), ("input_ids", learned))
    )
    for place, window in enumerate(order.tolist()):
        for side, (tokens, mask) in zip(
            ("chosen", "rejected"), sequences[2 * window : 2 * window + 2], strict=True
        ):
            found = (batch[f"{side}_input_ids"][place].tolist(), batch[f"{side}_{learned}"][place].tolist())
            assert found == row(tokens, mask, seq_len, labels=labels)
        assert windows.window_of(*windows.locate(window)) == window
    assert windows.num_places == 2 * len(windows) * seq_len
    width = seq_len if labels else seq_len + 1
    lengths = [len(tokens) for tokens, _ in sequences]
    assert windows.padding == sum(max(0, seq_len - length) for length in lengths)
    assert windows.unused_tokens == sum(max(0, length - width) for length in lengths)
    rejected = sequences[1][0]
    assert windows.window_of("text-00000", rejected[-1] - 3) == 0
    with pytest.raises(UserError, match="holds pairs .* take `layout` pad, not pack"):
        open_windows(shards, layout="pack", seq_len=seq_len)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("layout", ["pad", "pack", "concat"])
def test_windows_in_which_nothing_is_learned_are_counted_and_said(tmp_path, kind, layout):
    shards, _ = make(tmp_path / "a", kind, mask_of=lambda length: (np.arange(length) >= 6).astype(np.uint8))
    if kind == "dpo" and layout != "pad":
        return
    said = []
    windows = open_windows(shards, layout=layout, seq_len=8, say=said.append)
    batch = windows.fetch(np.arange(len(windows)))
    learns = [(array != IGNORED).any(axis=1) for name, array in batch.items() if name.endswith("targets")]
    wanted = int(np.count_nonzero(~np.logical_and.reduce(learns)))
    assert windows.count_unlearned() == wanted > 0
    assert f"in {wanted} of {len(windows)} windows of 8 tokens nothing is learned" in said[-1]


@pytest.mark.parametrize(
    ("kind", "layout"), [("sft", "pad"), ("sft", "pack"), ("sft", "concat"), ("dpo", "pad")]
)
def test_the_second_token_of_a_window_can_be_its_only_target_and_the_first_cannot(tmp_path, kind, layout):
    shards = [[9, 9, 9, 9]]
    for place, unlearned in ((0, True), (1, False), (8, False)):
        folder = tmp_path / f"{place}"
        dataset, _ = make(
            folder,
            kind,
            shards,
            mask_of=lambda length: (np.arange(length) == place).astype(np.uint8),  # noqa: B023
        )
        windows = open_windows(dataset, layout=layout, seq_len=9, labels=True)
        assert windows.count_unlearned() == (len(windows) if unlearned else 0)
        assert windows.any_learned() is not unlearned


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_whether_anything_is_learned_costs_the_masks_up_to_the_first_target(tmp_path, monkeypatch, kind):
    shards, _ = make(tmp_path / "a", kind, mask_of=lambda length: (np.arange(length) >= 6).astype(np.uint8))
    assert not open_windows(shards, layout="pad", seq_len=4).any_learned()
    monkeypatch.setattr(base, "_COUNTED_WINDOWS", 1)
    windows, read = open_windows(shards, layout="pad", seq_len=16), []
    have_targets = windows._have_targets
    monkeypatch.setattr(windows, "_have_targets", lambda batch: read.extend(batch) or have_targets(batch))
    assert windows.any_learned()
    first = next(number for number in range(len(windows)) if have_targets(np.array([number]))[0])
    assert read == list(range(first + 1))
    assert first < len(windows) - 1


def test_all_of_a_dataset_without_masks_is_learned(make_dataset):
    windows = open_windows(make_dataset([[5, 9], [3]]), layout="pad", seq_len=8)
    assert windows.count_unlearned() == 0
    assert windows.any_learned()
