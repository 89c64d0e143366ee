"""Small datasets whose tokens can be read off a failure, and JSON lines."""

import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from minimind_data.build.plan import TokenizeOptions
from minimind_data.dataset.format import (
    InputEntry,
    Manifest,
    ShardEntry,
    TokenizerInfo,
    dtype_for,
    numpy_dtype,
)
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.dataset.verification import verify
from minimind_data.dataset.writer import ShardWriter
from minimind_data.interchange.conversion import ConvertOptions, ConvertSummary, convert
from minimind_data.options import build

BOS, EOS, PAD = 1, 2, 0
TEXTS = [
    f"第{i}个问题：{i} 加 {i} 等于多少？ 等于 {2 * i}。<|im_end|> What is {i} times two? It is {2 * i}.<|im_end|>"
    + " filler" * (i % 40)
    for i in range(400)
]
"""Texts of many lengths, in two languages, with special tokens in them."""


CRASHING = """
import os, sys
from pathlib import Path
from minimind_data.build.plan import TokenizeOptions
from minimind_data.build.pipeline import tokenize

paths, crash_at = [Path(path) for path in sys.argv[1:-1]], int(sys.argv[-1])
calls = 0

def dying(name):
    real = getattr(os, name)
    def call(*arguments, **named):
        global calls
        calls += 1
        if calls == crash_at:
            os._exit(9)
        return real(*arguments, **named)
    return call

for name in ("replace", "unlink", "fsync", "mkdir", "rmdir"):
    setattr(os, name, dying(name))
"""
"""The beginning of a program `PATH... N` that ends, without any clean-up, before the N-th of its changes to the disk; it counts `calls`."""


def options(out: Path, **changes) -> TokenizeOptions:
    """Options of a build in this process, in splits so small that there are many."""
    return build(TokenizeOptions, {"out": out, "workers": 1, "split_bytes": 8192, **changes})


def tree(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, byte for byte."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., ShardSet]:
    """Make a dataset out of document lengths, a list for each shard.

    A document of length n is BOS, n - 2 tokens that count on from 3 through the whole dataset, EOS.
    """

    def make(shards: Sequence[Sequence[int]], *, name: str = "dataset", vocab_size: int = 6400) -> ShardSet:
        folder = tmp_path / name
        folder.mkdir()
        dtype = dtype_for(vocab_size)
        tokenizer = b'{"a": "tokenizer"}'
        (folder / "tokenizer.json").write_bytes(tokenizer)
        entries = []
        following = 0
        for index, lengths in enumerate(shards):
            with ShardWriter(folder, f"text-{index:05d}", dtype) as writer:
                for length in lengths:
                    inner = 3 + np.arange(following, following + length - 2) % (vocab_size - 3)
                    following += length - 2
                    document = np.array([BOS, *inner, EOS]).astype(numpy_dtype(dtype))
                    writer.append(document, np.array([length]))
                written = writer.commit()
            source = {"input": 0, "input_start": 0, "input_stop": 0, "input_sha256": ""}
            entries.append(ShardEntry(name=f"text-{index:05d}", **source, **asdict(written)))
        told = hashlib.sha256(tokenizer).hexdigest()
        manifest = Manifest(
            kind="pretrain",
            dtype=dtype,
            tokenizer=TokenizerInfo(sha256=told, vocab_size=vocab_size, bos_id=BOS, eos_id=EOS, pad_id=PAD),
            options={"field": "text"},
            inputs=(
                InputEntry(
                    path="text.jsonl", bytes=1, sha256=hashlib.sha256(repr(shards).encode()).hexdigest()
                ),
            ),
            shards=tuple(entries),
        )
        (folder / "manifest.json").write_text(manifest.to_json())
        return ShardSet.open(folder)

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
