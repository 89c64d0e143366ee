"""The bytes of a record that is longer than what is read at once, kept until its end is reached or it proves too long.

A megabyte of gzip can hold a gigabyte of one letter. So what is kept of a long record is compressed, and of a record beyond the
limit nothing but its beginning is kept: memory is bounded by the limit, and far below it where the input was compressed well.
"""

from typing import cast

from minimind_data.inputs.blocks import BadRecord

MAX_RECORD_BYTES = 2**30
"""Longest line or document, decompressed; memory must hold it several times over. A longer one is a bad record."""
_PLAIN_BYTES = 16 * 2**20
_BEGINNING_BYTES = 1000


class HeldRecord:
    """The bytes of one record.

    Attributes:
        num_bytes: how many were added.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[bytes, int | None]] = []
        """Each with its size before it was compressed; None where it was not."""
        self._beginning = b""
        self.num_bytes = 0

    @property
    def is_too_long(self) -> bool:
        """Whether it is longer than `MAX_RECORD_BYTES`, so that only its beginning is there."""
        return self.num_bytes > MAX_RECORD_BYTES

    def add(self, part: bytes) -> None:
        """Add the bytes that follow."""
        if self.num_bytes > MAX_RECORD_BYTES:
            return
        if not self._parts:
            self._beginning = part[:_BEGINNING_BYTES]
        self.num_bytes += len(part)
        if self.num_bytes > MAX_RECORD_BYTES:
            self._parts.clear()
        elif self.num_bytes <= _PLAIN_BYTES:
            self._parts.append((part, None))
        else:
            self._parts.append((_compressed(part), len(part)))

    def data(self) -> bytes:
        """Return the whole record, or its beginning if it is too long."""
        if self.is_too_long:
            return self._beginning
        return b"".join(part if size is None else _decompressed(part, size) for part, size in self._parts)


def _compressed(data: bytes) -> bytes:
    import pyarrow as pa  # noqa: PLC0415 - takes a tenth of a second

    return cast("bytes", pa.compress(data, codec="zstd", asbytes=True))


def _decompressed(data: bytes, size: int) -> bytes:
    import pyarrow as pa  # noqa: PLC0415 - as above

    return cast("bytes", pa.decompress(data, size, codec="zstd", asbytes=True))


def too_long(number: int, beginning: bytes, remedy: str) -> BadRecord:
    """Return the bad record for one that is too long.

    Args:
        number: of the record, from 1 at the first of the split.
        beginning: the bytes that are there of it.
        remedy: what to do.
    """
    reason = (
        f"a record of over {MAX_RECORD_BYTES >> 20:,} MiB, too long to be read or set aside whole; {remedy}"
    )
    return BadRecord(line=number, reason=reason, data=beginning)
