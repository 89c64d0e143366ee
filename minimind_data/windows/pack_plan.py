r"""The plan of layout `pack`: which documents share which window, made once and kept in a file. This docstring is its format.

Where: `DATASET/.mm-pack/NAME`, NAME being the first 16 digits of the dataset's fingerprint, the width of a window in tokens,
what is done with long documents, and the version: `0123456789abcdef-341-cut.v1`. Where the dataset cannot be written to, the same
under `$XDG_CACHE_HOME/minimind-pipeline/packing/` (`~/.cache` by default). The file depends on the tokens of the dataset and on
these settings alone. It can be deleted: it is made again when it is needed. All numbers are little-endian:

    128 bytes   the header:
        8 bytes   magic "MMPACK\0\0"
        u32       version, 1
        u32       CRC-32 of the whole file, these four bytes taken as 0
        32 bytes  fingerprint of the dataset
        u64 x 2   its documents, its tokens
        u64       width of a window in tokens: seq_len + 1 for inputs and targets, seq_len for unshifted labels
        u8        what is done with documents longer than that: 0 cut, 1 fragment, 2 drop
        u8 x 2    bytes of a number in `documents`, 4 or 8, and in `fragments`, 4 or 0; then 5 bytes 0
        u64 x 2   K, the windows; S, their segments
        u64 x 2   tokens in all windows; windows without PAD
        u64 x 2   documents longer than a window; tokens that stand in no window
    (K+1) x i64   `offsets`: the segments of window k are those from offsets[k] to offsets[k+1]
    S x u32       `documents`: the number of each segment's document; u64 in datasets of more than 2^32 documents
    S x u32       `fragments`: which part of its document each is, from 0; present only where documents are fragmented and one is
                  longer than a window, else every segment is part 0

Part f of a document begins at its token f * (width - 1) and has `width` tokens or what is left: neighbouring parts share a token,
the last target of the one and the first input of the other, so that every token but a document's first is a target once. A whole
document is its part 0; so is one that is cut, in which EOS takes the place of the last token of the window.

Which lengths share a window is decided in `bin_packing.py`, which documents of these lengths and in which order in `assignment.py`.
"""

import contextlib
import errno
import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Self, get_args

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.files import (
    FolderLock,
    fsync_folder,
    partial_name,
    remove_partials,
    user_error_on_full_disk,
)
from minimind_data.reporting import Say, say_nothing
from minimind_data.windows.assignment import assign_documents, count_segments
from minimind_data.windows.base import LongDocuments
from minimind_data.windows.bin_packing import best_fit

PACK_FOLDER_NAME = ".mm-pack"
VERSION = 1
LONG_DOCUMENTS: tuple[LongDocuments, ...] = get_args(LongDocuments)
"""In this order they are numbered in the file."""
_MAGIC = b"MMPACK\x00\x00"
_HEADER = struct.Struct("<8sII32sQQQBBB5xQQQQQQ")
_HEADER_BYTES = 128
_CRC_PLACE = slice(12, 16)
_BLOCK_SEGMENTS = 2**22


class PackPlan:
    """A plan, as a memory map of its file.

    Attributes:
        width: tokens in a window.
        long_documents: what was done with documents that are longer.
        offsets: int64 [K + 1], the segments of window k are those from offsets[k] to offsets[k + 1].
        documents: uint32 or uint64 [S], the document of each segment.
        fragments: uint32 [S], which part of the document it is; None where all are part 0.
        num_tokens: tokens in all windows.
        full_windows: windows without PAD.
        num_long: documents longer than a window.
        unused_tokens: tokens that stand in no window.
    """

    def __init__(
        self, path: Path, shards: ShardSet, header: tuple[Any, ...], content: NDArray[np.uint8]
    ) -> None:
        self._path = path
        self._shards = shards
        mode, document_bytes, fragment_bytes, num_windows, num_segments = header[7:12]
        self.width: int = header[6]
        self.long_documents: LongDocuments = LONG_DOCUMENTS[mode]
        self.num_tokens: int = header[12]
        self.full_windows: int = header[13]
        self.num_long: int = header[14]
        self.unused_tokens: int = header[15]
        documents, fragments, stop = _layout_of_file(
            num_windows, num_segments, document_bytes, fragment_bytes
        )
        self.offsets: NDArray[np.int64] = content[_HEADER_BYTES:documents].view("<i8")
        self.documents: NDArray[Any] = content[documents:fragments].view(f"<u{document_bytes}")
        self.fragments: NDArray[np.uint32] | None = (
            content[fragments:stop].view("<u4") if fragment_bytes else None
        )

    @classmethod
    def read(cls, path: Path, shards: ShardSet, *, check: bool = True) -> Self | None:
        """Map a plan; return None where there is none, or one that is damaged or belongs to something else.

        Args:
            path: the file.
            shards: the dataset that it must belong to.
            check: read all of it and compare its checksum.
        """
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < _HEADER_BYTES:
                    return None
                content = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except (FileNotFoundError, NotADirectoryError):
            return None
        header_bytes = content[:_HEADER_BYTES].tobytes()
        header = _HEADER.unpack(header_bytes)
        if (
            header[:2] != (_MAGIC, VERSION)
            or header[3:6] != _identity(shards)
            or size != _layout_of_file(header[10], header[11], header[8], header[9])[2]
            or (check and header[2] != _checksum(header_bytes, content))
            or path.name != _name(shards, header[6], LONG_DOCUMENTS[header[7]])
        ):
            return None
        return cls(path, shards, header, content)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a file name: the process that unpickles maps the file itself."""
        return (_reopen, (self._path, self._shards))

    @property
    def num_windows(self) -> int:
        """Windows of the plan."""
        return len(self.offsets) - 1

    def window_of(self, document: int, fragment: int) -> int | None:
        """Return the window that holds this part of a document, or None. This reads the whole plan, as it is seldom asked for."""
        for start in range(0, len(self.documents), _BLOCK_SEGMENTS):
            matches = self.documents[start : start + _BLOCK_SEGMENTS] == document
            if self.fragments is not None:
                matches &= self.fragments[start : start + _BLOCK_SEGMENTS] == fragment
            if matches.any():
                segment = start + int(np.argmax(matches))
                return int(np.searchsorted(self.offsets, segment, side="right")) - 1
        return None


def open_plan(
    shards: ShardSet, width: int, long_documents: LongDocuments, say: Say = say_nothing
) -> PackPlan:
    """Open the plan for windows of `width` tokens. Where there is none it is made first, while other processes wait for it.

    Args:
        shards: the dataset.
        width: tokens in a window, at least 2.
        long_documents: what is done with longer documents.
        say: takes a sentence when a plan is being made, or goes somewhere unexpected.

    Raises:
        UserError: it can be written neither into the dataset nor into the cache folder, or the disk is full.
        FormatError: a shard's index is damaged.
    """
    if any(entry.written.sequences != entry.written.documents for entry in shards.manifest.shards):
        raise UserError(
            "its documents are of several sequences each, which layout pack does not know",
            where=shards.folder,
        )
    name = _name(shards, width, long_documents)
    inside, cache = shards.folder / PACK_FOLDER_NAME, _cache_folder()
    for folder in (inside, cache):
        if plan := PackPlan.read(folder / name, shards):
            return plan
    if reason := _obstacle(inside):
        say(f"{shards.folder}: cannot be written ({reason}); the plan of its windows goes to {cache}")
        if here := _obstacle(cache):
            raise UserError(
                f"cannot be written ({here}), nor can {shards.folder}",
                where=cache,
                remedy="set XDG_CACHE_HOME to a folder for the plan of the windows",
            )
    return _make(cache if reason else inside, shards, width, long_documents, say)


def _cache_folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # the specification of base directories says to ignore such a value
        cache = Path("~/.cache")
        with contextlib.suppress(RuntimeError):  # there is no home folder: then `~` is a folder here
            cache = cache.expanduser()
    return cache / "minimind-pipeline" / "packing"


def _obstacle(folder: Path) -> str | None:
    """Make a folder, and return what keeps us from writing into it, or None."""
    try:
        with user_error_on_full_disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return error.strerror
    return None if os.access(folder, os.W_OK) else os.strerror(errno.EACCES)


def _reopen(path: Path, shards: ShardSet) -> PackPlan:
    plan = PackPlan.read(path, shards, check=False)
    if plan is None:
        raise UserError(
            "the plan of the windows is gone or changed",
            where=path,
            remedy="start again, which makes it again",
        )
    return plan


def _make(folder: Path, shards: ShardSet, width: int, long_documents: LongDocuments, say: Say) -> PackPlan:
    """Make a plan under its lock, unless another process has made it meanwhile."""
    name = _name(shards, width, long_documents)
    path = folder / name
    with user_error_on_full_disk(folder):
        waiting = f"{path}: another process is planning these windows; waiting for it"
        with FolderLock(folder / f"{name}.lock", waiting, wait=say):
            if plan := PackPlan.read(path, shards):
                return plan
            remove_partials(folder, {name})
            say(
                f"{shards.folder}: planning which of {shards.num_documents:,} documents share a window of {width:,} tokens"
            )
            try:
                with partial_name(path).open("w+b") as file:
                    _write(file, shards, width, long_documents, folder)
                    file.flush()
                    os.fsync(file.fileno())
                partial_name(path).replace(path)
            finally:
                partial_name(path).unlink(missing_ok=True)
            fsync_folder(folder)
            if folder.parent == shards.folder:
                _remove_stale(folder, shards)
    return _reopen(path, shards)


def _remove_stale(folder: Path, shards: ShardSet) -> None:
    """Remove the plans of earlier states of this dataset; a process that has one mapped can go on reading it."""
    for path in folder.glob("*.v*"):
        if not path.name.startswith(f"{shards.manifest.fingerprint[:16]}-") and path.suffix != ".lock":
            path.unlink(missing_ok=True)


def _name(shards: ShardSet, width: int, long_documents: LongDocuments) -> str:
    return f"{shards.manifest.fingerprint[:16]}-{width}-{long_documents}.v{VERSION}"


def _identity(shards: ShardSet) -> tuple[bytes, int, int]:
    return (bytes.fromhex(shards.manifest.fingerprint), shards.num_documents, shards.num_tokens)


def _layout_of_file(
    num_windows: int, num_segments: int, document_bytes: int, fragment_bytes: int
) -> tuple[int, int, int]:
    """Return the bytes at which `documents` and `fragments` begin in a file, and its size."""
    documents = _HEADER_BYTES + 8 * (num_windows + 1)
    fragments = documents + document_bytes * num_segments
    return documents, fragments, fragments + fragment_bytes * num_segments


def _checksum(header: bytes, content: NDArray[np.uint8]) -> int:
    blank = header[: _CRC_PLACE.start] + bytes(4) + header[_CRC_PLACE.stop :]
    return zlib.crc32(content[_HEADER_BYTES:].data, zlib.crc32(blank))


def _write(file: BinaryIO, shards: ShardSet, width: int, long_documents: LongDocuments, folder: Path) -> None:
    """Plan, and write the plan into an empty file, its header last."""
    counts = count_segments(shards, width, long_documents)
    packing = best_fit(counts.histogram)
    num_segments = int(counts.histogram.sum())
    document_bytes = 4 if shards.num_documents <= 2**32 else 8
    fragment_bytes = 4 if counts.fragmented else 0
    shape = (packing.num_windows, num_segments, document_bytes, fragment_bytes)
    documents_at, fragments_at, stop = _layout_of_file(*shape)
    windows = segments = 0
    _write_at(file, _HEADER_BYTES, np.zeros(1, "<i8"))
    for block in assign_documents(counts, packing, folder):
        offsets = segments + np.cumsum(block.sizes)
        _write_at(file, _HEADER_BYTES + 8 * (windows + 1), offsets.astype("<i8"))
        _write_at(
            file, documents_at + document_bytes * segments, block.documents.astype(f"<u{document_bytes}")
        )
        if block.fragments is not None:
            _write_at(file, fragments_at + fragment_bytes * segments, block.fragments.astype("<u4"))
        windows += len(block.sizes)
        segments = int(offsets[-1])
    assert (windows, segments) == shape[:2]
    full_windows = int(packing.windows[packing.filled == width].sum())
    totals = (int(packing.windows @ packing.filled), full_windows, counts.num_long, counts.unused_tokens)
    settings = (
        *_identity(shards),
        width,
        LONG_DOCUMENTS.index(long_documents),
        document_bytes,
        fragment_bytes,
    )
    header = _HEADER.pack(_MAGIC, VERSION, 0, *settings, *shape[:2], *totals)
    file.flush()
    content = np.frombuffer(mmap.mmap(file.fileno(), stop, access=mmap.ACCESS_READ), np.uint8)
    checksum = _checksum(header, content).to_bytes(4, "little")
    complete = header[: _CRC_PLACE.start] + checksum + header[_CRC_PLACE.stop :]
    _write_at(file, 0, np.frombuffer(complete, np.uint8))


def _write_at(file: BinaryIO, place: int, values: NDArray[Any]) -> None:
    file.seek(place)
    file.write(values.tobytes())
