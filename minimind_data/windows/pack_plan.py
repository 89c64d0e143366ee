r"""The plan of layout `pack`: which documents share which window, made once and kept in a file.

Where: `DATASET/.mm-pack/NAME`, NAME being the first 16 digits of the dataset's fingerprint, the width of a window in tokens,
what is done with long documents, and the version: `0123456789abcdef-341-cut.v1`. Where the dataset cannot be written to, the same
under `$XDG_CACHE_HOME/minimind-pipeline/packing/` (`~/.cache` by default). The file depends on the tokens of the dataset and on
these settings alone. It can be deleted: it is made again when it is needed. How the file is laid out says `dataset.plan_file`.

Which lengths share a window is decided in `bin_packing.py`, which documents of these lengths and in which order in `assignment.py`.
"""

import contextlib
import errno
import mmap
import os
import re
from pathlib import Path
from typing import Any, BinaryIO, Self, get_args

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.plan_file import (
    HEADER_BYTES,
    PACK_FOLDER_NAME,
    VERSION,
    PlanFile,
    PlanHeader,
    identity,
)
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.files import (
    FolderLock,
    fsync_folder,
    naming,
    partial_name,
    remove_partials,
    user_error_on_full_disk,
)
from minimind_data.reporting import Say, say_nothing
from minimind_data.windows.assignment import assign_documents, count_segments
from minimind_data.windows.base import LongDocuments
from minimind_data.windows.bin_packing import best_fit

LONG_DOCUMENTS: tuple[LongDocuments, ...] = get_args(LongDocuments)
"""In this order they are numbered in the file."""
_BLOCK_SEGMENTS = 2**22
_PLAN_NAME = re.compile(r"([0-9a-f]{16})-\d+-[a-z]+\.v\d+")
"""The name of any plan's file, with the beginning of its dataset's fingerprint."""


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

    def __init__(self, path: Path, shards: ShardSet, file: PlanFile) -> None:
        self._path = path
        self._shards = shards
        header = file.header
        self.width = header.width
        self.long_documents = LONG_DOCUMENTS[header.mode]
        self.num_tokens = header.num_tokens
        self.full_windows = header.full_windows
        self.num_long = header.num_long
        self.unused_tokens = header.unused_tokens
        self.offsets = file.offsets
        self.documents = file.documents
        self.fragments = file.fragments

    @classmethod
    def read(cls, path: Path, shards: ShardSet, *, check: bool = True) -> Self | None:
        """Map a plan; return None where there is none, or one that is damaged or belongs to something else.

        Args:
            path: the file.
            shards: the dataset that it must belong to.
            check: read all of it and compare its checksum.
        """
        file = PlanFile.read(path, shards.manifest)
        if file is None or file.header.mode >= len(LONG_DOCUMENTS):
            return None
        if path.name != _name(shards, file.header.width, LONG_DOCUMENTS[file.header.mode]):
            return None
        return None if check and file.problem() else cls(path, shards, file)

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
                with naming(path), partial_name(path).open("w+b") as file:
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
        match = _PLAN_NAME.fullmatch(path.name)
        if match is not None and match[1] != shards.manifest.fingerprint[:16]:
            path.unlink(missing_ok=True)


def _name(shards: ShardSet, width: int, long_documents: LongDocuments) -> str:
    return f"{shards.manifest.fingerprint[:16]}-{width}-{long_documents}.v{VERSION}"


def _write(file: BinaryIO, shards: ShardSet, width: int, long_documents: LongDocuments, folder: Path) -> None:
    """Plan, and write the plan into an empty file, its header last."""
    counts = count_segments(shards, width, long_documents)
    packing = best_fit(counts.histogram)
    num_segments = int(counts.histogram.sum())
    document_bytes = 4 if shards.num_documents <= 2**32 else 8
    fragment_bytes = 4 if counts.fragmented else 0
    header = PlanHeader(
        *identity(shards.manifest),
        width,
        LONG_DOCUMENTS.index(long_documents),
        document_bytes,
        fragment_bytes,
        packing.num_windows,
        num_segments,
        num_tokens=int(packing.windows @ packing.filled),
        full_windows=int(packing.windows[packing.filled == width].sum()),
        num_long=counts.num_long,
        unused_tokens=counts.unused_tokens,
    )
    documents_at, fragments_at, stop = header.places
    windows = segments = 0
    _write_at(file, HEADER_BYTES, np.zeros(1, "<i8"))
    for block in assign_documents(counts, packing, folder):
        offsets = segments + np.cumsum(block.sizes)
        _write_at(file, HEADER_BYTES + 8 * (windows + 1), offsets.astype("<i8"))
        _write_at(
            file, documents_at + document_bytes * segments, block.documents.astype(f"<u{document_bytes}")
        )
        if block.fragments is not None:
            _write_at(file, fragments_at + fragment_bytes * segments, block.fragments.astype("<u4"))
        windows += len(block.sizes)
        segments = int(offsets[-1])
    assert (windows, segments) == (header.num_windows, header.num_segments)
    file.flush()
    content = np.frombuffer(mmap.mmap(file.fileno(), stop, access=mmap.ACCESS_READ), np.uint8)
    _write_at(file, 0, np.frombuffer(header.pack(content), np.uint8))


def _write_at(file: BinaryIO, place: int, values: NDArray[Any]) -> None:
    file.seek(place)
    file.write(values.tobytes())
