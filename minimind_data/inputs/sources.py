"""A source: one input, where it lies, and how its bytes are opened.

What object stores hold (see `stores`) is read in ranges, never fetched whole.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal, cast

from minimind_data.errors import UserError
from minimind_data.files import MORE_FILES, is_out_of_files
from minimind_data.inputs import stores
from minimind_data.json_fields import PathText
from minimind_data.reporting import Report

Compression = Literal["gzip", "zstd"]
STDIN = "-"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input: where it lies and how to read it."""

    name: PathText
    """In messages and the manifest: the path or the URI, without credentials."""
    location: PathText
    """The path or URI that is opened."""
    form: str
    """What its bytes are: a name in `forms.FORMS`."""
    compression: Compression | None = None

    @property
    def is_remote(self) -> bool:
        """Whether it lies in an object store."""
        return stores.is_uri(self.location)

    def is_absolute(self) -> bool:
        """Tell whether it can be opened from any working directory."""
        return self.is_remote or Path(self.location).is_absolute()

    def absolute(self) -> "Source":
        """Return the same source to be written to a file: it can be opened from any working directory, and holds no credentials."""
        if self.is_remote:
            return replace(self, location=stores.without_secrets(self.location))
        return replace(self, location=str(Path(self.location).absolute()))

    def open(self) -> BinaryIO:
        """Open its bytes as they are stored; the file can seek.

        Raises:
            UserError: it cannot be opened.
        """
        if self.is_remote:
            return stores.open_file(self.location)
        try:
            return Path(self.location).open("rb")
        except FileNotFoundError:
            raise UserError("no such file", where=self.name) from None
        except PermissionError:
            raise UserError("may not be read", where=self.name, remedy="change its permissions") from None
        except OSError as error:
            remedy = MORE_FILES if is_out_of_files(error) else None
            raise UserError(f"cannot be opened ({error.strerror})", where=self.name, remedy=remedy) from None

    def open_text(self) -> BinaryIO:
        """Open its bytes decompressed; the file can seek only if nothing was compressed."""
        raw = self.open()
        if self.compression is None:
            return raw
        return _decompressed(raw, self.compression)

    def stamp(self) -> tuple[int, int]:
        """Return (size in bytes, time of the last change in nanoseconds, 0 where that is not known)."""
        if self.is_remote:
            return stores.stamp(self.location)
        with self.reading():
            status = Path(self.location).stat()
        return status.st_size, status.st_mtime_ns

    def is_gone(self) -> bool:
        """Tell whether there is no such file any more; a missing object in a store is noticed only when it is read."""
        return not self.is_remote and not os.path.exists(self.location)  # noqa: PTH110 - Path.exists raises for a name too long

    @contextlib.contextmanager
    def reading(self, *, as_container: bool = False) -> Iterator[None]:
        """Turn what goes wrong with its bytes inside the block into a UserError about it.

        Args:
            as_container: the bytes have an inner structure, as Parquet's have, so an error means that they are damaged. So does a
                name in them that is no UTF-8.
        """
        try:
            yield
        except Exception as error:
            is_damage = as_container and isinstance(error, UnicodeDecodeError)
            if not (is_damage or stores.is_of_reading(error)):
                raise
            cause, remedy = stores.first_line(error), "get it again"
            if self.is_remote:
                cause = stores.without_its_secrets(cause, self.location)
                remedy = "check it and the connection, then run the same command again"
            what = "damaged or cut off" if self.compression or as_container else "cannot be read"
            raise UserError(f"{what} ({cause})", where=self.name, remedy=remedy) from None


def _decompressed(raw: BinaryIO, compression: Compression) -> BinaryIO:
    import pyarrow as pa  # noqa: PLC0415 - takes a tenth of a second

    file = raw if isinstance(raw, pa.NativeFile) else pa.PythonFile(raw, mode="r")
    return cast("BinaryIO", pa.CompressedInputStream(file, compression))


def spool(stream: BinaryIO, path: Path, report: Report) -> None:
    """Copy a stream that can be read only once into a file, which can be read again.

    Args:
        stream: standard input.
        path: of the file; it is overwritten.
        report: takes the bytes of each block.

    Raises:
        UserError: the stream cannot be read.
    """
    with path.open("wb") as file:
        while True:
            try:
                block = stream.read(2**20)
            except OSError as error:
                raise UserError(
                    f"standard input cannot be read ({error.strerror})",
                    where=STDIN,
                    remedy="pipe text into this command",
                ) from None
            if not block:
                return
            file.write(block)
            report(len(block), 0)
