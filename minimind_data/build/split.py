"""One split of an input becomes one shard: the unit of work that engines run.

Reading, encoding and writing overlap, so that a split takes as long as its encoding. The result depends on the bytes of the input and on
the job alone: not on the process, the machine, the backend or what ran before.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from minimind_data.build.bad_records import (
    SetAsideFile,
    are_too_many,
    bad_record_error,
    set_aside_path,
    too_many_error,
)
from minimind_data.build.dedup import hashes_of, in_validation
from minimind_data.build.overlap import DifferenceError, ahead, encode_blocks
from minimind_data.chat.encoding import ChatEncoding, encode_conversations
from minimind_data.dataset.format import (
    VALIDATION_NAME,
    MaskArray,
    ShardOrigin,
    TokenArray,
    TokenDtype,
    TokenizerInfo,
    WrittenShard,
    numpy_dtype,
)
from minimind_data.dataset.framing import frame_texts
from minimind_data.dataset.writer import ShardWriter
from minimind_data.files import sha256_of_bytes, user_error_on_full_disk, write_atomic
from minimind_data.hashing import STRIDE
from minimind_data.inputs.base import Split
from minimind_data.inputs.blocks import Block
from minimind_data.inputs.forms import form_of
from minimind_data.inputs.spec import RecordSpec
from minimind_data.inputs.splits import open_reader
from minimind_data.json_fields import BESIDE, Count, FileName
from minimind_data.reporting import CountedReport, Report
from minimind_data.tokenizer.backends import Encoder, Ids, Offsets, first_difference, make_encoder
from minimind_data.tokenizer.loading import cached_tokenizer

_COMPARE_ONE_IN = 1024
"""One document in so many is encoded by the reference too. The reference is forty times slower, so that is four per cent of the work."""
_COMPARE_MAX_CHARS = 2**17
"""Longer documents are not compared: that would take seconds for each."""
_MAX_NAMES = 64
"""Names that the counts of a split have."""
HASHES_SUFFIX = ".hashes"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all splits of a build share."""

    work_folder: Path
    """Where results and bad records are kept until the manifest is written."""
    out: Path
    tokenizer_json: str
    tokenizer: TokenizerInfo
    dtype: TokenDtype
    backend: str
    records: RecordSpec
    on_bad_record: Literal["stop", "set-aside"]
    max_bad_share: float = 1.0
    """The share of the records that may be set aside."""
    val_fraction: float = 0.0
    encoder_threads: int = 1
    """How many blocks of text are encoded at the same time."""
    chat: ChatEncoding | None = None
    """How conversations become tokens, where the records are some."""
    step: Literal["make", "hash"] = "make"
    """`hash` only writes the hashes of the texts, for `dedup`."""


@dataclass(frozen=True, kw_only=True)
class SplitTask:
    """One split to be made."""

    name: str
    """Of the shard that it becomes."""
    input: int
    """The index of its input in the manifest."""
    split: Split
    drop: NDArray[np.int32] | None = None
    """Numbers of the documents to leave out as duplicates, ascending; None where duplicates are kept."""

    @property
    def is_first(self) -> bool:
        """Whether no record of the dataset comes before it."""
        return self.input == 0 and self.split.start == 0

    @property
    def duplicates_sha256(self) -> str:
        """SHA-256 of `drop` as little-endian int32; empty where it is None."""
        return "" if self.drop is None else sha256_of_bytes(self.drop.astype("<i4").tobytes())


@dataclass(frozen=True, kw_only=True)
class SplitResult:
    """The result of one split, which the work folder keeps until the manifest is written."""

    name: FileName
    origin: Annotated[ShardOrigin, BESIDE]
    """Without `first_line`, which is known only when all splits before this one are made."""
    compared: Count
    """How many documents had their ids compared with the reference's."""
    backend: str
    """The encoder that made the split."""
    difference: str | None
    """How the fast backend differed from the reference, which then made the split; None where it did not differ."""
    shard: WrittenShard | None
    """None where the split has no document and so makes no shard."""
    val_shard: WrittenShard | None
    """The shard in the validation part; None where it would be empty."""

    @property
    def num_bad(self) -> int:
        """Bad records that were set aside."""
        return self.origin.set_aside

    @property
    def num_records(self) -> int:
        """All records that it was read from; lines of white space are none."""
        documents = sum(shard.documents for shard in (self.shard, self.val_shard) if shard is not None)
        return documents + self.origin.empty_texts + self.origin.duplicates + self.origin.set_aside

    def to_json(self) -> dict[str, Any]:
        """Return the object in `NAME.result.json`, in which the items of the origin stand beside the others."""
        content = asdict(self)
        origin = content.pop("origin")
        del origin["first_line"]
        return {**origin, **content}


@dataclass(frozen=True, kw_only=True)
class HashResult:
    """The hashes of the texts of a split are written."""

    name: str


def run_task(job: Job, task: SplitTask, report: Report) -> SplitResult | HashResult:
    """Do the step of the job for one split.

    Raises:
        UserError: a record is bad (unless bad records are set aside), or the disk is full.
    """
    with user_error_on_full_disk(job.out):
        return build_split(job, task, report) if job.step == "make" else _hash_split(job, task, report)


def _hash_split(job: Job, task: SplitTask, report: Report) -> HashResult:
    hashes: list[bytes] = []
    for block in open_reader(task.split, job.records, job.chat).blocks():
        hashes.append(hashes_of(block.documents))
        report(block.num_bytes, 0)
    write_atomic(hashes_path(job.work_folder, task.name), b"".join(hashes))
    return HashResult(name=task.name)


def build_split(job: Job, task: SplitTask, report: Report) -> SplitResult:
    """Make the shard of one split, and commit it.

    Raises:
        UserError: a record is bad, unless bad records are set aside.
    """
    counted = CountedReport(report)
    try:
        return _build(job, task, job.backend, None, counted)
    except DifferenceError as difference:
        counted.take_back()
        return _build(job, task, "tokenizers", str(difference), report)


def _build(job: Job, task: SplitTask, backend: str, difference: str | None, report: Report) -> SplitResult:
    reader = open_reader(task.split, job.records, job.chat)
    encoder = _encoder(job.tokenizer_json, job.tokenizer, backend)
    set_aside = SetAsideFile(set_aside_path(job.work_folder, task.name))
    empty_texts = compared = num_texts = num_records = different_prompts = unlearned = 0
    # Where duplicates are left out, they are counted when the split is done.
    watches_bad = task.is_first and task.drop is None
    unread: Counter[str] = Counter()
    forms: Counter[str] = Counter()
    with (
        set_aside,
        _Writers(job, task.name) as writers,
        # Closed here, and not wherever an error that holds them is forgotten, which may be in a thread of their own.
        contextlib.closing(ahead(_without(reader.blocks(), task.drop))) as blocks,
        contextlib.closing(ahead(encode_blocks(encoder, blocks, job.encoder_threads))) as encoded_blocks,
    ):
        for block, ids, offsets in encoded_blocks:
            if block.bad and job.on_bad_record == "stop":
                raise bad_record_error(task.split, job.records, block.bad[0])
            set_aside.add(block.bad)
            num_records += len(block.texts) // block.texts_each + block.empty_texts + len(block.bad)
            if watches_bad and are_too_many(set_aside.num_bad, num_records, job.max_bad_share):
                assert set_aside.first is not None
                place = form_of(task.split.source, job.records).place(task.split, set_aside.first.line)
                raise too_many_error(place, set_aside.first.reason, (set_aside.num_bad, num_records))
            empty_texts += block.empty_texts
            if backend != "tokenizers":
                compared += _compare(job, block.texts, ids, offsets, num_texts)
            num_texts += len(block.texts)
            different_prompts += block.different_prompts
            unread.update(block.unread)
            forms.update(block.forms)
            tokens, lengths, mask, unlearned_here = _sequences(job, block, ids, offsets)
            unlearned += unlearned_here
            writers.append(block, tokens, lengths, mask)
            report(block.num_bytes, len(tokens))
        shard, val_shard = writers.commit()
    return SplitResult(
        name=task.name,
        origin=ShardOrigin(
            input=task.input,
            input_start=reader.begin,
            input_stop=reader.end,
            input_sha256=reader.sha256,
            inputs=1 + len(task.split.more),
            lines=reader.num_lines,
            empty_texts=empty_texts,
            set_aside=set_aside.num_bad,
            duplicates=0 if task.drop is None else len(task.drop),
            duplicates_sha256=task.duplicates_sha256,
            different_prompts=different_prompts,
            unlearned=unlearned,
            unread=_most_frequent(unread),
            forms=_most_frequent(forms),
        ),
        compared=compared,
        backend=backend,
        difference=difference,
        shard=shard,
        val_shard=val_shard,
    )


def _most_frequent(counts: Counter[str]) -> dict[str, int]:
    """Return counts by their names; of names beyond all measure, such as ids for names of fields, the sum of the rest."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ordered[_MAX_NAMES:])
    return dict(ordered[:_MAX_NAMES]) | ({"…": rest} if rest else {})


def _sequences(
    job: Job, block: Block, ids: Ids, offsets: Offsets
) -> tuple[TokenArray, NDArray[np.int64], MaskArray | None, int]:
    """Return (tokens of a block as they are stored, lengths of its sequences, loss mask, conversations with an unlearned answer)."""
    if job.chat is None:
        return *frame_texts(ids, offsets, job.tokenizer, job.dtype), None, 0
    tokenizer = cached_tokenizer(job.tokenizer_json, job.tokenizer)
    assert block.conversations is not None
    ids, offsets, mask, unlearned = encode_conversations(
        block.conversations, ids=ids, offsets=offsets, tokenizer=tokenizer, marks=job.chat.marks
    )
    return ids.astype(numpy_dtype(job.dtype)), np.diff(offsets), mask, unlearned


class _Writers:
    """Writes the shard of a split, and that of its validation part."""

    def __init__(self, job: Job, name: str) -> None:
        self._val_fraction = job.val_fraction
        self._counts = [0, 0]
        self._stack = contextlib.ExitStack()
        folders = [job.out] if not job.val_fraction else [job.out, job.out / VALIDATION_NAME]
        with self._stack:  # should the second one fail, the first is closed
            self._writers = [
                self._stack.enter_context(
                    ShardWriter(
                        folder,
                        name,
                        job.dtype,
                        sequences_per_document=2 if job.chat is not None and job.chat.kind == "dpo" else 1,
                        masked=job.chat is not None,
                    )
                )
                for folder in folders
            ]
            self._stack = self._stack.pop_all()

    def append(
        self, block: Block, tokens: TokenArray, lengths: NDArray[np.int64], mask: MaskArray | None
    ) -> None:
        """Add the documents of a block, each to its shard."""
        if not self._val_fraction:
            self._add(0, tokens, lengths, mask)
            return
        in_part = np.repeat(in_validation(block.documents, self._val_fraction), block.texts_each)
        for side, here in enumerate((~in_part, in_part)):
            tokens_here = np.repeat(here, lengths)
            self._add(side, tokens[tokens_here], lengths[here], None if mask is None else mask[tokens_here])

    def _add(self, side: int, tokens: TokenArray, lengths: NDArray[np.int64], mask: MaskArray | None) -> None:
        self._writers[side].append(tokens, lengths, mask)
        self._counts[side] += len(lengths)

    def commit(self) -> tuple[WrittenShard | None, WrittenShard | None]:
        """Commit the shards that have documents: (that of the split, that of its validation part)."""
        shards = [
            writer.commit() if count else None
            for writer, count in zip(self._writers, self._counts, strict=False)
        ]
        return shards[0], shards[1] if len(shards) > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def _without(blocks: Iterator[Block], drop: NDArray[np.int32] | None) -> Generator[Block, None, None]:
    """Yield blocks without the documents of these numbers, which count from the beginning of the split."""
    if drop is None or not len(drop):
        yield from blocks
        return
    dropped = set(drop.tolist())
    number = 0
    for block in blocks:
        num_documents = len(block.texts) // block.texts_each
        places = [place for place in range(num_documents) if number + place not in dropped]
        number += num_documents
        yield block.keep(places)


@functools.lru_cache(maxsize=1)
def _encoder(tokenizer_json: str, info: TokenizerInfo, backend: str) -> Encoder:
    """Return the encoder of this process, which is kept: making one takes as long as encoding megabytes."""
    tokenizer = cached_tokenizer(tokenizer_json, info)
    try:
        return make_encoder(tokenizer, backend)
    except Exception as error:
        if backend == "tokenizers":
            raise
        raise DifferenceError(f"{backend} failed with this tokenizer ({error})") from None


def _compare(job: Job, texts: list[str], ids: Ids, offsets: Offsets, first_number: int) -> int:
    """Compare the ids of some texts of a block with the reference's, and return how many texts that were.

    Args:
        job: of the split.
        texts: of the block.
        ids: uint32 [T], of all texts.
        offsets: int64 [texts + 1], where each text begins in `ids`.
        first_number: how many texts of the split came before.

    Raises:
        DifferenceError: the ids of a text differ.
    """
    # Multiples of the stride are spread evenly, so no period in the input can keep its texts out of the sample.
    numbers = np.arange(first_number, first_number + len(texts), dtype=np.uint64)
    keys = (numbers * STRIDE) >> np.uint64(40)
    sample = [
        int(i) for i in np.flatnonzero(keys % _COMPARE_ONE_IN == 0) if len(texts[i]) <= _COMPARE_MAX_CHARS
    ]
    if not sample:
        return 0
    sample_ids = np.concatenate([ids[offsets[i] : offsets[i + 1]] for i in sample])
    sample_offsets = np.cumsum([0, *(offsets[i + 1] - offsets[i] for i in sample)])
    tokenizer = cached_tokenizer(job.tokenizer_json, job.tokenizer)
    different = first_difference(tokenizer, [texts[i] for i in sample], sample_ids, sample_offsets)
    if different is not None:
        raise DifferenceError(f"document {first_number + sample[different] + 1} of the split")
    return len(sample)


def hashes_path(work_folder: Path, name: str) -> Path:
    """Return the path of the hashes of a split's texts."""
    return work_folder / f"{name}{HASHES_SUFFIX}"
