r"""The file of a packing plan: how it is laid out, and whether one is what it says. `windows.pack_plan` says what a plan is and makes it.

All numbers are little-endian:

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
"""

import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.format import Manifest

PACK_FOLDER_NAME = ".mm-pack"
VERSION = 1
HEADER_BYTES = 128
_MAGIC = b"MMPACK\x00\x00"
_HEADER = struct.Struct("<8sII32sQQQBBB5xQQQQQQ")
_CRC_PLACE = slice(12, 16)
_BLOCK = 2**22


class PlanHeader(NamedTuple):
    """The fixed first bytes of a plan, in the order in which they stand there."""

    fingerprint: bytes
    num_documents: int
    num_dataset_tokens: int
    width: int
    mode: int
    """What is done with long documents, by its number."""
    document_bytes: int
    fragment_bytes: int
    num_windows: int
    num_segments: int
    num_tokens: int
    full_windows: int
    num_long: int
    unused_tokens: int

    @property
    def places(self) -> tuple[int, int, int]:
        """The bytes at which `documents` and `fragments` begin in the file, and its size."""
        documents = HEADER_BYTES + 8 * (self.num_windows + 1)
        fragments = documents + self.document_bytes * self.num_segments
        return documents, fragments, fragments + self.fragment_bytes * self.num_segments

    def pack(self, content: NDArray[np.uint8]) -> bytes:
        """Return the header as it stands before the content of a whole file, uint8, whose own first 128 bytes do not matter."""
        blank = _HEADER.pack(_MAGIC, VERSION, 0, *self)
        checksum = _checksum(blank, content).to_bytes(4, "little")
        return blank[: _CRC_PLACE.start] + checksum + blank[_CRC_PLACE.stop :]


class PlanFile:
    """A plan's file, mapped.

    Attributes:
        header: its header.
        offsets: int64 [K + 1].
        documents: uint32 or uint64 [S].
        fragments: uint32 [S], or None.
    """

    def __init__(self, header: PlanHeader, content: NDArray[np.uint8]) -> None:
        self.header = header
        self._content = content
        documents, fragments, stop = header.places
        self.offsets: NDArray[np.int64] = content[HEADER_BYTES:documents].view("<i8")
        self.documents: NDArray[np.unsignedinteger] = content[documents:fragments].view(
            f"<u{header.document_bytes}"
        )
        self.fragments: NDArray[np.uint32] | None = (
            content[fragments:stop].view("<u4") if header.fragment_bytes else None
        )

    @classmethod
    def read(cls, path: Path, manifest: Manifest) -> Self | None:
        """Map a plan; return None where there is none, or one of another version, dataset or size, or under another name.

        Raises:
            OSError: it cannot be read.
        """
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < HEADER_BYTES:
                    return None
                content = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except (FileNotFoundError, NotADirectoryError):
            return None
        magic, version, _, *rest = _HEADER.unpack(content[:HEADER_BYTES].tobytes())
        header = PlanHeader(*rest)
        if (
            (magic, version) != (_MAGIC, VERSION)
            or header[:3] != identity(manifest)
            or header.document_bytes not in (4, 8)
            or header.fragment_bytes not in (0, 4)
            or size != header.places[2]
            or not path.name.startswith(f"{manifest.fingerprint[:16]}-{header.width}-")
        ):
            return None
        return cls(header, content)

    def problem(self) -> str | None:
        """Read all of it and return a clause on what is wrong, or None. What it points at is looked at too, as anybody can make a CRC fit."""
        header = self._content[:HEADER_BYTES].tobytes()
        if int.from_bytes(header[_CRC_PLACE], "little") != _checksum(_blank(header), self._content):
            return "its CRC-32 does not fit"
        last = 0
        for block in _blocks(self.offsets):
            if block[0] < last or (np.diff(block) < 0).any():
                return "its windows do not follow each other"
            last = int(block[-1])
        if self.offsets[0] != 0 or last != self.header.num_segments:
            return "its windows are not made of its segments"
        if any(int(block.max()) >= self.header.num_documents for block in _blocks(self.documents)):
            return "it names a document that the dataset does not have"
        return None


def identity(manifest: Manifest) -> tuple[bytes, int, int]:
    """Return what the header of a plan says of its dataset: fingerprint, documents, tokens."""
    return (bytes.fromhex(manifest.fingerprint), manifest.num_documents, manifest.num_tokens)


def plans_of(folder: Path, manifest: Manifest) -> list[Path]:
    """Return the plans in a dataset's folder that are of the dataset as it is; others are stale, and deleted in time."""
    paths = (folder / PACK_FOLDER_NAME).glob(f"{manifest.fingerprint[:16]}-*.v{VERSION}")
    return sorted(paths)


def _blocks(array: NDArray[np.generic]) -> Iterator[NDArray[np.generic]]:
    return (array[start : start + _BLOCK] for start in range(0, len(array), _BLOCK))


def _blank(header: bytes) -> bytes:
    return header[: _CRC_PLACE.start] + bytes(4) + header[_CRC_PLACE.stop :]


def _checksum(blank_header: bytes, content: NDArray[np.uint8]) -> int:
    return zlib.crc32(content[HEADER_BYTES:].data, zlib.crc32(blank_header))
