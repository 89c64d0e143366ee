"""Small datasets whose tokens can be read off a failure, and JSON lines."""

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from minimind_data.dataset.shard_set import ShardSet
from minimind_data.dataset.verification import verify
from minimind_data.interchange.conversion import ConvertOptions, ConvertSummary, convert
from tests.helpers.datasets import BOS, EOS, PAD, write_dataset


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., ShardSet]:
    """Make a dataset out of document lengths, a list for each shard.

    A document of length n is BOS, n - 2 tokens that count on from 3 through the whole dataset, EOS.
    """

    def make(shards: Sequence[Sequence[int]], *, name: str = "dataset", vocab_size: int = 6400) -> ShardSet:
        following = 0

        def document(length: int) -> list[int]:
            nonlocal following
            inner = 3 + np.arange(following, following + length - 2) % (vocab_size - 3)
            following += length - 2
            return [BOS, *inner, EOS]

        documents = [[document(length) for length in lengths] for lengths in shards]
        return write_dataset(tmp_path / name, documents, vocab_size=vocab_size, source=repr(shards))

    return make


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write texts as JSON lines into a file of this name."""

    def write(texts: Sequence[str], name: str = "text.jsonl") -> Path:
        path = tmp_path / name
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
        path.write_text("".join(lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def small_tokenizer(tmp_path: Path) -> Path:
    """A folder with a tokenizer of 50 entries, BOS 1, EOS 2, PAD 0."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    words = {"<pad>": PAD, "<s>": BOS, "</s>": EOS} | {f"w{i}": i for i in range(3, 50)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<pad>")).save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def bring(small_tokenizer: Path, tmp_path: Path) -> Callable[..., tuple[list[list[int]], ConvertSummary]]:
    """Convert a source into a dataset and return its documents."""

    def call(source, name="made", kind="auto", **options):
        options = ConvertOptions(out=tmp_path / name, **{"tokenizer": small_tokenizer, **options})
        summary = convert(source, options, source_format=kind)
        assert not verify(tmp_path / name).problems
        found = []
        for shard in ShardSet.open(tmp_path / name):
            starts = shard.offsets // shard.tokens.itemsize
            spans = zip(starts, shard.lengths, strict=True)
            found += [shard.tokens[start : start + length].tolist() for start, length in spans]
        return found, summary

    return call


@pytest.fixture
def write_megatron() -> Callable[..., Path]:
    """Write a pair as Megatron's _IndexWriter lays it out; `sequences_of` divides a document."""

    def write(stem, documents, dtype="<u2", code=8, *, sequences_of=None, modes=b""):
        sequences_of = sequences_of or (lambda document: [document])
        sequences = [sequence for document in documents for sequence in sequences_of(document)]
        lengths = np.array([len(sequence) for sequence in sequences], "<i4")
        starts = np.cumsum([0, *(len(sequences_of(document)) for document in documents)])
        offsets = (np.cumsum(lengths) - lengths) * np.dtype(dtype).itemsize
        index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(starts))
        index += lengths.tobytes() + offsets.astype("<i8").tobytes() + starts.astype("<i8").tobytes() + modes
        stem.with_name(stem.name + ".idx").write_bytes(index)
        ids = [token for document in documents for token in document]
        stem.with_name(stem.name + ".bin").write_bytes(np.array(ids, dtype).tobytes())
        return stem

    return write
