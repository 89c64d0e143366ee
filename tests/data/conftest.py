"""Small datasets whose tokens can be read off a failure, and JSON lines."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from minimind_data.format import InputEntry, Manifest, ShardEntry, TokenizerInfo, dtype_for, numpy_dtype
from minimind_data.shards import ShardSet
from minimind_data.writer import ShardWriter

BOS, EOS, PAD = 1, 2, 0


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
