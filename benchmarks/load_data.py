"""One corpus for all loaders: a stream of tokens of real text, and the windows that a loader must return.

`mm-data` tokenizes the text. Its documents are repeated, each time in another order, until the stream is long enough. For loaders
that tokenize, windows of it are decoded to text. A small corpus of the same kind serves to check the loaders.
"""

import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.tokenizer.loading import Tokenizer

_FRAME_TOKENS = 2
_DOCUMENTS_AT_A_TIME = 4096


def tokenized(text: Path, tokenizer: Path) -> list[NDArray[np.uint16]]:
    """Return the documents of a text, with BOS and EOS."""
    with tempfile.TemporaryDirectory(prefix="load-data-") as folder:
        tokenize([text], TokenizeOptions(out=Path(folder), tokenizer=tokenizer))
        shards = ShardSet.open(folder)
        return [
            np.array(document)
            for shard in shards
            for document in np.split(shard.tokens, np.cumsum(shard.lengths)[:-1])
        ]


def write_corpus(
    folder: Path,
    documents: list[NDArray[np.uint16]],
    tokenizer: Tokenizer,
    *,
    num_windows: int,
    num_texts: int,
    seq_len: int,
) -> int:
    """Write tokens.bin, lengths.bin and windows.jsonl into a folder; return the number of windows of the stream.

    Args:
        folder: is created.
        documents: which are repeated.
        tokenizer: of the documents.
        num_windows: minimum number of windows.
        num_texts: how many windows are decoded to text, each of which fills a window again.
        seq_len: tokens of a window.
    """
    folder.mkdir(parents=True)
    wanted = num_windows * seq_len + 1
    lengths: list[int] = []
    written = 0
    with (folder / "tokens.bin").open("wb") as out:
        turns = _in_turns(documents)
        while written < wanted:
            some = list(itertools.islice(turns, _DOCUMENTS_AT_A_TIME))
            ends = np.cumsum([len(document) for document in some])
            count = int(np.searchsorted(ends, wanted - written)) + 1
            out.write(np.concatenate(some[:count]).tobytes())
            lengths += [len(document) for document in some[:count]]
            written += int(ends[min(count, len(some)) - 1])
    np.array(lengths, np.int64).tofile(folder / "lengths.bin")
    tokens = np.memmap(folder / "tokens.bin", np.uint16, "r")
    size = seq_len - _FRAME_TOKENS
    starts = range(0, min(num_texts, len(tokens) // size) * size, size)
    texts = tokenizer.reference.decode_batch(
        [tokens[start : start + size].tolist() for start in starts], skip_special_tokens=True
    )
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (folder / "windows.jsonl").write_text("".join(lines), encoding="utf-8")
    return (written - 1) // seq_len


def _in_turns(documents: list[NDArray[np.uint16]]) -> Iterator[NDArray[np.uint16]]:
    """Yield all documents, again and again, each time in another order."""
    yield from documents
    for seed in itertools.count():
        for index in np.random.default_rng(seed).permutation(len(documents)).tolist():
            yield documents[index]


def expected_windows(folder: Path, seq_len: int, stride: int) -> list[bytes]:
    """Return the inputs of the windows at every stride of a small corpus."""
    tokens = np.fromfile(folder / "tokens.bin", np.uint16)
    return [tokens[start : start + seq_len].tobytes() for start in range(0, len(tokens) - seq_len, stride)]


def expected_texts(folder: Path, seq_len: int, tokenizer: Tokenizer) -> list[bytes]:
    """Return the samples that MiniMind's loader makes of the texts of a small corpus."""
    lines = (folder / "windows.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    rows = np.full((len(texts), seq_len), tokenizer.info.pad_id, np.uint16)
    for row, encoding in zip(
        rows, tokenizer.reference.encode_batch(texts, add_special_tokens=False), strict=True
    ):
        ids = [tokenizer.info.bos_id, *encoding.ids[: seq_len - _FRAME_TOKENS], tokenizer.info.eos_id]
        row[: len(ids)] = ids
    return [row.tobytes() for row in rows]


def compare(epoch: NDArray[np.uint16], expected: list[bytes], batch: int) -> str:
    """Say how an epoch compares with the expected windows, each of which must come once, except in an incomplete last batch.

    Raises:
        ValueError: it has other windows.
    """
    seen, wanted = Counter(row.tobytes() for row in epoch), Counter(expected)
    if strange := (seen - wanted).total():
        raise ValueError(f"{strange} of {len(epoch)} windows are not of the data, or came twice")
    if (missing := (wanted - seen).total()) >= batch:
        raise ValueError(f"{missing} of {len(expected)} windows never came")
    return "each window once"


def compare_tokens(epoch: NDArray[np.uint16], folder: Path, batch: int) -> str:
    """Say how an epoch compares with the tokens of the stream, in any order, except for an incomplete last batch.

    Raises:
        ValueError: it has other tokens.
    """
    stream = np.fromfile(folder / "tokens.bin", np.uint16)
    seen, wanted = (np.bincount(tokens.reshape(-1), minlength=2**16) for tokens in (epoch, stream))
    if (
        strange := int(np.maximum(seen - wanted, 0).sum())
    ) > 0 or wanted.sum() - seen.sum() > batch * epoch.shape[1]:
        raise ValueError(f"{strange} tokens too many of their kind, {wanted.sum() - seen.sum()} missing")
    return "each token once"


def compare_places(epoch: NDArray[np.uint16], folder: Path) -> str:
    """Say how much of the stream a loader has seen that draws windows with replacement.

    Raises:
        ValueError: a window is not one of the stream.
    """
    stream = (folder / "tokens.bin").read_bytes()
    places = []
    for row in epoch:
        wanted, place = row.tobytes(), -1
        while (place := stream.find(wanted, place + 1)) % 2:  # tokens begin at even bytes; -1 is odd
            if place < 0:
                raise ValueError("a window is not of the data")
        places.append(place // 2)
    seen = np.zeros(len(stream) // 2, np.bool_)
    for place in places:
        seen[place : place + epoch.shape[1]] = True
    return f"drawn with return: {seen.mean():.0%} seen in an epoch"
