"""One split of one input becomes one shard: the unit of work that engines run.

Reading and parsing, encoding, and writing run as three overlapping stages, so that the encoder is what costs. The result
depends on the input's bytes and the job alone: not on the process, the machine, the backend or what ran before.
"""

import base64
import functools
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray

from minimind_data.errors import UserError
from minimind_data.files import disk_full_is_plain, write_atomic
from minimind_data.format import TokenArray, TokenDtype, TokenizerInfo, numpy_dtype
from minimind_data.records import BadRecord, Block, LineReader, Split, count_lines, read_blocks
from minimind_data.tokenizer import (
    Encoder,
    Ids,
    Offsets,
    ReferenceEncoder,
    cached_tokenizer,
    first_difference,
    make_encoder,
)
from minimind_data.writer import ShardWriter, WrittenShard

# One document in this many goes on being compared with the reference. At a fortieth of the fast encoder's speed that is
# some four per cent of the work; giants are left to the check at the start, they would cost seconds each.
_COMPARE_ONE_IN = 1024
_COMPARE_MAX_CHARS = 2**17
_STAGE_DEPTH = 2
SET_ASIDE_SUFFIX = ".set-aside.jsonl"

_T = TypeVar("_T")
Report = Callable[[int, int], None]
"""Told (bytes of input, tokens) as they are done."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all splits of a build share."""

    work_folder: Path
    """Where results and set-aside records wait for the manifest."""
    out: Path
    tokenizer_json: str
    tokenizer: TokenizerInfo
    dtype: TokenDtype
    backend: str
    field: str
    max_word_chars: int
    on_bad_record: Literal["stop", "set-aside"]


@dataclass(frozen=True, kw_only=True)
class SplitTask:
    """One split to be made."""

    name: str
    """Of the shard."""
    input: int
    """Which input, by its place in the manifest."""
    split: Split


@dataclass(frozen=True, kw_only=True)
class SplitResult:
    """What one split gave; written beside the shard until the manifest takes it over."""

    name: str
    input: int
    input_start: int
    input_stop: int
    input_sha256: str
    lines: int
    empty_texts: int
    set_aside: int
    compared: int
    """Documents whose ids were compared with the reference's."""
    backend: str
    difference: str | None
    """How the fast backend differed from the reference, which then did the split; None where it did not."""
    shard: WrittenShard | None
    """None where the split holds no document: it makes no shard."""


class _DifferenceError(Exception):
    """The fast backend failed, or it and the reference disagree about a document."""


def build_split(job: Job, task: SplitTask, report: Report) -> SplitResult:
    """Make the shard of one split, and commit it.

    Raises:
        UserError: a bad record (unless they are set aside), or the disk is full.
    """
    told = [0, 0]

    def count(num_bytes: int, num_tokens: int) -> None:
        told[0] += num_bytes
        told[1] += num_tokens
        report(num_bytes, num_tokens)

    with disk_full_is_plain(job.out):
        try:
            return _build(job, task, job.backend, None, count)
        except _DifferenceError as difference:
            report(-told[0], -told[1])
            return _build(job, task, "tokenizers", str(difference), report)


def _build(job: Job, task: SplitTask, backend: str, difference: str | None, report: Report) -> SplitResult:
    reader = LineReader(task.split)
    encoder = _encoder(job.tokenizer_json, job.tokenizer, backend)
    blocks = _ahead(read_blocks(reader, field=job.field, max_word_chars=job.max_word_chars))
    bad: list[BadRecord] = []
    empty_texts = compared = num_documents = 0
    with ShardWriter(job.out, task.name, job.dtype) as writer:
        for block, ids, offsets in _ahead(_encode(encoder, blocks)):
            if block.bad and job.on_bad_record == "stop":
                raise _bad_record_error(task.split.path, reader.begin, block.bad[0])
            bad += block.bad
            empty_texts += block.empty_texts
            if backend != "tokenizers":
                compared += _compare(job, block.texts, ids, offsets, num_documents)
            num_documents += len(block.texts)
            tokens, lengths = frame(ids, offsets, job.tokenizer, job.dtype)
            writer.append(tokens, lengths)
            report(block.num_bytes, len(tokens))
        shard = writer.commit() if num_documents else None
    if bad:
        write_atomic(set_aside_path(job.work_folder, task.name), b"".join(map(_set_aside_line, bad)))
    return SplitResult(
        name=task.name,
        input=task.input,
        input_start=reader.begin,
        input_stop=reader.end,
        input_sha256=reader.sha256,
        lines=reader.num_lines,
        empty_texts=empty_texts,
        set_aside=len(bad),
        compared=compared,
        backend=backend,
        difference=difference,
        shard=shard,
    )


def frame(
    ids: Ids, offsets: Offsets, info: TokenizerInfo, dtype: TokenDtype
) -> tuple[TokenArray, NDArray[np.int64]]:
    """Put BOS before and EOS behind every text of a batch.

    Args:
        ids: uint32 [T], the texts' ids end to end.
        offsets: int64 [n + 1], where each text begins.
        info: for BOS and EOS.
        dtype: of the result.

    Returns:
        (tokens [T + 2n] of `dtype`, lengths int64 [n] of the documents with BOS and EOS).
    """
    num_texts = len(offsets) - 1
    tokens = np.empty(len(ids) + 2 * num_texts, numpy_dtype(dtype))
    bos_places = offsets[:-1] + 2 * np.arange(num_texts)
    eos_places = offsets[1:] + 2 * np.arange(num_texts) + 1
    is_text = np.ones(len(tokens), np.bool_)
    is_text[bos_places] = False
    is_text[eos_places] = False
    tokens[is_text] = ids
    tokens[bos_places] = info.bos_id
    tokens[eos_places] = info.eos_id
    return tokens, np.diff(offsets) + 2


def set_aside_path(work_folder: Path, name: str) -> Path:
    """Return where the bad records of a split wait."""
    return work_folder / f"{name}{SET_ASIDE_SUFFIX}"


@functools.lru_cache(maxsize=1)
def _encoder(tokenizer_json: str, info: TokenizerInfo, backend: str) -> Encoder:
    """Return this process's encoder; making one takes as long as encoding megabytes."""
    return make_encoder(cached_tokenizer(tokenizer_json, info), backend)


def _encode(encoder: Encoder, blocks: Iterator[Block]) -> Generator[tuple[Block, Ids, Offsets], None, None]:
    for block in blocks:
        try:
            ids, offsets = encoder.encode_batch(block.texts)
        except (KeyboardInterrupt, SystemExit, MemoryError, UserError):
            raise
        except BaseException as error:  # a panic in Rust is no Exception
            if encoder.name == ReferenceEncoder.name:
                raise
            raise _DifferenceError(f"it failed: {type(error).__name__}: {error}") from None
        yield block, ids, offsets


def _compare(job: Job, texts: list[str], ids: Ids, offsets: Offsets, first_number: int) -> int:
    """Hold some documents of a batch against the reference; return how many."""
    # Multiplying by 2^64 / golden ratio scatters the numbers, so that no period in the input hides from the check.
    numbers = np.arange(first_number, first_number + len(texts), dtype=np.uint64)
    scattered = (numbers * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    chosen = [
        int(i)
        for i in np.flatnonzero(scattered % _COMPARE_ONE_IN == 0)
        if len(texts[i]) <= _COMPARE_MAX_CHARS
    ]
    if not chosen:
        return 0
    chosen_ids = np.concatenate([ids[offsets[i] : offsets[i + 1]] for i in chosen])
    chosen_offsets = np.cumsum([0, *(offsets[i + 1] - offsets[i] for i in chosen)])
    tokenizer = cached_tokenizer(job.tokenizer_json, job.tokenizer)
    different = first_difference(tokenizer, [texts[i] for i in chosen], chosen_ids, chosen_offsets)
    if different is not None:
        raise _DifferenceError(f"document {first_number + chosen[different] + 1} of the split")
    return len(chosen)


def _bad_record_error(path: Path, split_begin: int, bad: BadRecord) -> UserError:
    line = count_lines(path, split_begin) + bad.line
    return UserError(f"{path}:{line}: {bad.reason} (or --on-bad-record set-aside goes on without such lines)")


def _set_aside_line(bad: BadRecord) -> bytes:
    """Write a bad record so that its bytes can be had back; `line` still counts from the split's first line."""
    try:
        data = {"data": bad.data.decode()}
    except UnicodeDecodeError:
        data = {"data_base64": base64.b64encode(bad.data).decode()}
    return orjson.dumps({"line": bad.line, "reason": bad.reason, **data}, option=orjson.OPT_APPEND_NEWLINE)


def _ahead(items: Generator[_T, None, None]) -> Generator[_T, None, None]:
    """Run an iterator in a thread of its own, a few items ahead; its exception is raised where its item would be."""
    ready: queue.Queue[_T | _End] = queue.Queue(_STAGE_DEPTH)
    stopped = threading.Event()

    def put(item: _T | _End) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def produce() -> None:
        end = _End()
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    break
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the consumer
            end = _End(error)
        finally:
            items.close()
            put(end)

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stopped.set()
        thread.join()


@dataclass(frozen=True)
class _End:
    """Stands behind the last item of a stage, with the exception that made it the last, if any."""

    error: BaseException | None = None
