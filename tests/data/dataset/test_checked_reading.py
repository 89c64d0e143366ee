"""Reading a shard from front to back: in blocks of whole documents, all of it, and not without its checksums."""

import numpy as np
import pytest

from minimind_data.dataset import checked_reading
from minimind_data.dataset.checked_reading import checked_sequences
from minimind_data.dataset.format import FormatError
from minimind_data.dataset.shard_set import ShardSet
from tests.helpers.datasets import write_dataset

LENGTHS = [[4, 9, 2, 30, 5, 6, 3, 3], [2, 2], [17, 8, 3, 40]]


def make(folder, kind):
    """Write a dataset whose tokens count on from 3; return it, and (ids, mask) of the sequences of each shard."""
    following, shards = 3, []
    for lengths in LENGTHS:
        shards.append([])
        for length in lengths:
            ids = np.arange(following, following + length)
            shards[-1].append((ids, (ids % 3 == 0).astype(np.uint8)))
            following += length
    plain = [[ids for ids, _ in sequences] for sequences in shards]
    return write_dataset(folder, plain if kind == "pretrain" else shards, kind=kind), shards


@pytest.mark.parametrize("block_tokens", [1, 2, 3, 13, 1000])
@pytest.mark.parametrize("kind", ["pretrain", "sft", "dpo"])
def test_a_shard_is_read_in_blocks_of_whole_documents(tmp_path, monkeypatch, kind, block_tokens):
    shards, expected = make(tmp_path / "a", kind)
    monkeypatch.setattr(checked_reading, "BLOCK_TOKENS", block_tokens)
    each = 2 if kind == "dpo" else 1
    for index, sequences in enumerate(expected):
        steps = []
        blocks = list(checked_sequences(shards, index, lambda *step: steps.append(step)))  # noqa: B023
        tokens = np.concatenate([tokens for tokens, _, _ in blocks])
        assert tokens.tolist() == [token for ids, _ in sequences for token in ids]
        assert [length for _, lengths, _ in blocks for length in lengths] == [
            len(ids) for ids, _ in sequences
        ]
        if kind == "pretrain":
            assert all(mask is None for _, _, mask in blocks)
        else:
            masks = np.concatenate([mask for _, _, mask in blocks])
            assert masks.tolist() == [bit for _, mask in sequences for bit in mask]
        for tokens, lengths, _ in blocks:
            assert len(lengths) % each == 0
            assert len(tokens) == lengths.sum()
            assert len(tokens) <= block_tokens or len(lengths) == each
        assert steps == [(2 * len(tokens), len(tokens)) for tokens, _, _ in blocks]


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".mask"])
def test_a_flipped_bit_is_found_when_all_is_read(tmp_path, suffix):
    shards, _ = make(tmp_path / "a", "sft")
    path = tmp_path / "a" / f"{shards.manifest.shards[2].name}{suffix}"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    shards = ShardSet.open(tmp_path / "a")
    for index in (0, 1):
        assert list(checked_sequences(shards, index, lambda *_: None))
    with pytest.raises(FormatError, match=rf"{path.name}: SHA-256 .* where the manifest says"):
        list(checked_sequences(shards, 2, lambda *_: None))
