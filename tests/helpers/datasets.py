"""Small datasets: of any documents, written shard by shard, and of texts and conversations."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.dataset.format import (
    InputEntry,
    Kind,
    Manifest,
    ShardEntry,
    ShardOrigin,
    TokenizerInfo,
    dtype_for,
    numpy_dtype,
)
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.dataset.writer import ShardWriter

BOS, EOS, PAD = 1, 2, 0

_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_dataset(
    folder: Path,
    shards: Iterable[Iterable],
    *,
    kind: Kind = "pretrain",
    tokenizer: str = '{"a": "tokenizer"}',
    vocab_size: int = 6400,
    source: str = "text",
) -> ShardSet:
    """Write a dataset, its manifest too, and open it.

    Args:
        folder: where to; it is made.
        shards: the sequences of each shard, in order: arrays of ids; for `sft` and `dpo` pairs of such arrays, ids and mask. Two
            sequences after each other are one document of `dpo`.
        kind: of the dataset.
        tokenizer: the text of its tokenizer.json, of any content that has `BOS`, `EOS` and `PAD`.
        vocab_size: of the tokenizer.
        source: what the shards are said to be made from; another source, another fingerprint.
    """
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(tokenizer, "utf-8")
    dtype = dtype_for(vocab_size)
    masked = kind != "pretrain"
    entries = []
    for number, sequences in enumerate(shards):
        name = f"text-{number:05d}"
        with ShardWriter(
            folder, name, dtype, sequences_per_document=2 if kind == "dpo" else 1, masked=masked
        ) as writer:
            for sequence in sequences:
                ids, mask = sequence if masked else (sequence, None)
                writer.append(np.asarray(ids, numpy_dtype(dtype)), np.array([len(ids)]), mask)
            written = writer.commit()
        entries.append(
            ShardEntry(
                name=name,
                written=written,
                origin=ShardOrigin(input=0, input_start=number, input_stop=number + 1, input_sha256=""),
            )
        )
    manifest = Manifest(
        kind=kind,
        dtype=dtype,
        tokenizer=TokenizerInfo(
            sha256=hashlib.sha256(tokenizer.encode()).hexdigest(),
            vocab_size=vocab_size,
            bos_id=BOS,
            eos_id=EOS,
            pad_id=PAD,
        ),
        options={"field": "text"},
        inputs=(
            InputEntry(
                path="text.jsonl", bytes=len(entries), sha256=hashlib.sha256(source.encode()).hexdigest()
            ),
        ),
        shards=tuple(entries),
    )
    (folder / "manifest.json").write_text(manifest.to_json(), "utf-8")
    return ShardSet.open(folder)


def byte_tokenizer() -> Tokenizer:
    """A tokenizer with an id for every byte and three special tokens, of which none is merged."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_SPECIAL)
    return tokenizer


def text_dataset(folder: Path, seed: int = 0) -> Path:
    """Write 64 documents of single bytes in two shards, text-00000 and text-00001, and return the folder; another seed, another dataset."""
    generator = np.random.default_rng(seed)
    tokenizer = byte_tokenizer()

    def document() -> list[int]:
        text = "".join(generator.choice(list("北京abc ,.\n"), generator.integers(4, 30)))
        return [BOS, *tokenizer.encode(text, add_special_tokens=False).ids, EOS]

    write_dataset(
        folder,
        [[document() for _ in range(count)] for count in (30, 34)],
        tokenizer=tokenizer.to_str(pretty=True),
        vocab_size=tokenizer.get_vocab_size(),
        source=f"seed {seed}",
    )
    return folder


def retokenized(folder: Path) -> Path:
    """Write the dataset of `text_dataset` with a tokenizer of the same entries in another file, so another tokenizer."""
    text_dataset(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=2))
    manifest = Manifest.read(folder)
    info = replace(manifest.tokenizer, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    (folder / "manifest.json").write_text(replace(manifest, tokenizer=info).to_json(), encoding="utf-8")
    return folder


def chat_dataset(folder: Path, kind: Kind, count: int = 40, seed: int = 0) -> Path:
    """Tokenize conversations (`sft`) or pairs (`dpo`) of short sums with the tokenizer that ships with the package."""
    generator = np.random.default_rng(seed)
    lines = []
    for one, other in generator.integers(1, 50, (count, 2)).tolist():
        asked = [{"role": "user", "content": f"{one} + {other}?"}]
        right, wrong = (
            [*asked, {"role": "assistant", "content": text}]
            for text in (f"That is {one + other}.", f"I do not know what {one} is.")
        )
        again = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
        lines.append(
            {"conversations": right + again} if kind == "sft" else {"chosen": right, "rejected": wrong}
        )
    folder.mkdir(parents=True)
    source = folder / "chats.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenize([source], TokenizeOptions(out=folder / "data", kind=kind, workers=1))
    return folder / "data"
