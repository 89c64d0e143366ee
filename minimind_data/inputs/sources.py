"""Where records come from: files, folders, globs and object stores, and the form that each file has.

A form is told by content first (compressed files and Parquet have a magic number) and then by name; what neither tells is
refused, not guessed. What object stores hold (see `stores.py`) is read in ranges, never fetched whole.

Sources of the magic numbers: RFC 1952 (gzip), RFC 8878 (zstd), the Apache Parquet format specification.
"""

import contextlib
import glob
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal, cast, get_args

from minimind_data.errors import UserError
from minimind_data.inputs import stores

Form = Literal["jsonl", "parquet", "text"]
Format = Literal["auto", "jsonl", "parquet", "text"]
"""What a user may say of all inputs; `auto` looks at each."""
Compression = Literal["gzip", "zstd"]

_COMPRESSIONS: dict[bytes, Compression] = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_COMPRESSION_SUFFIXES = (".gz", ".gzip", ".zst", ".zstd")
_OTHER_MAGICS = {
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf": "7-Zip",
    b"ARROW1": "Arrow",
    b"ORC": "ORC",
}
_PARQUET_MAGIC = b"PAR1"
_FORMS: dict[str, Form] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".json"), "jsonl"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".txt", ".text"), "text"),
}
_GLOB = re.compile(r"[*?\[]")
_HEAD_BYTES = 4096
_MAX_STEM_BYTES = 160  # file systems take 255, and what a build appends takes some 50
STDIN = "-"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input: where it lies and how to read it."""

    name: str
    """As messages and the manifest show it: the path or the URI, without credentials."""
    location: str
    """What is opened."""
    form: Form
    compression: Compression | None = None

    @property
    def stem(self) -> str:
        """The name of its shards: the file's name without what tells its form."""
        if self.name == STDIN:
            return "stdin"
        name = stores.name_of(self.name) if stores.is_uri(self.name) else PurePosixPath(self.name).name
        for suffixes in (_COMPRESSION_SUFFIXES, tuple(_FORMS)):
            for suffix in suffixes:
                if name.lower().endswith(suffix) and len(name) > len(suffix):
                    name = name[: -len(suffix)]
                    break
        return name.encode()[:_MAX_STEM_BYTES].decode(errors="ignore")

    @property
    def is_remote(self) -> bool:
        """Whether it lies in an object store."""
        return stores.is_uri(self.location)

    def is_absolute(self) -> bool:
        """Tell whether it can be opened from any working directory."""
        return self.is_remote or Path(self.location).is_absolute()

    def absolute(self) -> "Source":
        """Return the same source to be written down: it can be opened from any working directory, and holds no credentials."""
        if stores.is_uri(self.location):
            return replace(self, location=stores.without_secrets(self.location))
        return replace(self, location=str(Path(self.location).absolute()))

    def open(self) -> BinaryIO:
        """Open its bytes as they are stored; they can be sought in.

        Raises:
            UserError: it cannot be opened.
        """
        return _open(self.location, self.name)

    def open_text(self) -> BinaryIO:
        """Open its bytes decompressed; they can be sought in only where nothing was compressed."""
        raw = self.open()
        if self.compression is None:
            return raw
        return _decompressed(raw, self.compression)

    def stamp(self) -> tuple[int, int]:
        """Return (size in bytes, time of the last change in nanoseconds, 0 where that is not known)."""
        if not stores.is_uri(self.location):
            with self.reading():
                status = Path(self.location).stat()
            return status.st_size, status.st_mtime_ns
        return stores.stamp(self.location)

    def is_gone(self) -> bool:
        """Tell whether there is no such file any more; an object of a store is only missed when it is read."""
        return not stores.is_uri(self.location) and not Path(self.location).exists()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Turn what goes wrong with its bytes inside the block into a sentence about it."""
        try:
            yield
        except Exception as error:
            is_name = self.form == "parquet" and isinstance(error, UnicodeDecodeError)  # of a column
            if not (is_name or stores.is_of_reading(error)):
                raise
            said, remedy = stores.first_line(error), "get it again"
            if stores.is_uri(self.location):
                said = stores.without_its_secrets(said, self.location)
                remedy = "check it and the connection, then run the same command again"
            what = "damaged or cut off" if self.compression or self.form == "parquet" else "cannot be read"
            raise UserError(f"{self.name}: {what} ({said}); {remedy}") from None


def expand(inputs: Sequence[str], form: Format = "auto") -> tuple[list[Source], list[str]]:
    """Find the files that inputs name, in order, and tell their forms.

    Args:
        inputs: paths, folders, globs and URIs. A folder or a glob stands for its files sorted by name.
        form: what form all of them have; `auto` tells it from each.

    Returns:
        (the sources, what the user should know about files of a folder that were left out).

    Raises:
        UserError: an input is missing, empty, no file, named twice, or of no form that can be told.
    """
    sources: list[Source] = []
    notes: list[str] = []
    taken: dict[str, str] = {}
    for given in inputs:
        if given == STDIN:
            raise UserError(
                "-: standard input can be read once, and by tokenize alone; save it to a file first"
            )
        files, left_out = _files_of(given, form)
        if left_out:
            some = ", ".join(PurePosixPath(_shown(path)).name for path in left_out[:3])
            notes.append(
                f"{_shown(given)}: {len(left_out)} files of no known form are left out ({some}{', …' if len(left_out) > 3 else ''})"
            )
        for location in files:
            key = _shown(location) if stores.is_uri(location) else os.path.realpath(location)
            if key in taken:
                raise UserError(
                    f"{_shown(location)}: named twice (by {taken[key]} and by {_shown(given)}); its documents would be doubled"
                )
            taken[key] = _shown(given)
            sources.append(tell(location, form))
    return sources, notes


def tell(location: str, form: Format = "auto", *, name: str | None = None) -> Source:
    """Look at a file and say what form it has.

    Raises:
        UserError: it is missing, empty, no file, or its form cannot be told.
    """
    shown = name or _shown(location)
    _check_is_file(location, shown)
    with _open(location, shown) as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        raise UserError(f"{shown}: the file is empty; there is nothing to tokenize")
    try:
        shown.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{shown}: the name is no UTF-8, so a manifest cannot hold it; rename the file"
        ) from None
    compression = next((kind for magic, kind in _COMPRESSIONS.items() if head.startswith(magic)), None)
    source = Source(name=shown, location=location, form="jsonl", compression=compression)
    if compression is not None:
        with source.reading(), source.open_text() as text:
            head = text.read(_HEAD_BYTES)
        if not head:
            raise UserError(f"{shown}: nothing is in it once decompressed; there is nothing to tokenize")
    detected = _form_of(shown, head, form, compressed=compression is not None)
    return Source(name=shown, location=location, form=detected, compression=compression)


def _form_of(name: str, head: bytes, wanted: Format, *, compressed: bool) -> Form:
    other = next((kind for magic, kind in _OTHER_MAGICS.items() if head.startswith(magic)), None)
    if other is not None:
        raise UserError(f"{name}: a {other} file; unpack it, or write it as JSON lines, Parquet or text")
    is_parquet = head.startswith(_PARQUET_MAGIC)
    if is_parquet and compressed:
        raise UserError(f"{name}: a compressed Parquet file; decompress it, Parquet compresses by itself")
    if is_parquet and wanted in ("auto", "parquet"):
        return "parquet"
    form = _form_by_name(name) if wanted == "auto" else wanted
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if form == "parquet":
        raise UserError(f"{name}: no Parquet file, whatever its name says (it should begin with PAR1)")
    if form is None:
        if not start.startswith(b"{"):
            raise UserError(f"{name}: its form cannot be told; say --format {', '.join(get_args(Form))}")
        form = "jsonl"
    if form == "jsonl" and start.startswith(b"[") and not _is_json(start.split(b"\n")[0]):
        raise UserError(f"{name}: one JSON array, not one record a line; rewrite it, as with `jq -c '.[]'`")
    return form


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _files_of(given: str, form: Format) -> tuple[list[str], list[str]]:
    """Return (files, files left out) that one input stands for."""
    if stores.is_uri(given):
        found, is_folder = stores.files(given)
        return _known(given, found, form) if is_folder else (found, [])
    try:
        path = Path(given)
        if path.is_dir():
            return _known(given, _below(path), form)
        if not path.exists() and _GLOB.search(given):
            matches = sorted(one for one in glob.glob(given, recursive=True) if not Path(one).is_dir())  # noqa: PTH207 - from cwd or root
            if not matches:
                raise UserError(f"{given}: no file matches")
            return matches, []
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else given
        raise UserError(
            f"{where}: cannot be looked into ({error.strerror}); mend that, or name the files that matter"
        ) from None
    return [given], []


def _below(folder: Path) -> list[str]:
    """Return the files in a folder and its folders, in order, those with a dot in front left out.

    Links are followed, each folder is seen once. What cannot be listed is an error, for its files would be missing.
    """

    def refuse(error: OSError) -> None:
        raise error

    found: list[str] = []
    seen = {os.path.realpath(folder)}
    for place, folders, names in os.walk(str(folder), onerror=refuse, followlinks=True):
        found += [str(Path(place, name)) for name in names if not name.startswith(".")]
        wanted = sorted(name for name in folders if not name.startswith("."))
        folders.clear()
        for name in wanted:
            real = os.path.realpath(Path(place, name))
            if real not in seen:
                seen.add(real)
                folders.append(name)
    return sorted(found)


def _known(given: str, found: list[str], form: Format) -> tuple[list[str], list[str]]:
    if form != "auto":
        known, left_out = found, []
    else:
        known = [file for file in found if _form_by_name(_shown(file))]
        left_out = [file for file in found if not _form_by_name(_shown(file))]
    if not known:
        raise UserError(
            f"{_shown(given)}: a folder without any file of a known form ({', '.join(sorted(_FORMS))}, also .gz or .zst)"
        )
    return known, left_out


def _form_by_name(name: str) -> Form | None:
    """Return the form that a name, as it is shown, promises; None where it promises none."""
    base = name.lower()
    for suffix in _COMPRESSION_SUFFIXES:
        base = base.removesuffix(suffix)
    return _FORMS.get(PurePosixPath(base).suffix)


def _shown(location: str) -> str:
    """Return a path as it is and a URI without its credentials."""
    return stores.shown(location) if stores.is_uri(location) else location


def _check_is_file(location: str, name: str) -> None:
    if stores.is_uri(location):
        return
    path = Path(location)
    with contextlib.suppress(OSError):  # opening it will say
        if path.is_dir():
            raise UserError(f"{name}: a folder, where a file is needed")
        if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
            raise UserError(
                f"{name}: a pipe or a device, which cannot be read twice; save it to a file, or pipe it into `-`"
            )


def _open(location: str, name: str) -> BinaryIO:
    if stores.is_uri(location):
        return stores.open_file(location)
    try:
        return Path(location).open("rb")
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except PermissionError:
        raise UserError(f"{name}: may not be read; change its permissions") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be opened ({error.strerror})") from None


def _decompressed(raw: BinaryIO, compression: Compression) -> BinaryIO:
    import pyarrow as pa  # noqa: PLC0415 - takes a tenth of a second

    file = raw if isinstance(raw, pa.NativeFile) else pa.PythonFile(raw, mode="r")
    return cast("BinaryIO", pa.CompressedInputStream(file, compression))


def spool(stream: BinaryIO, path: Path, report: Callable[[int], None] = lambda _: None) -> None:
    """Copy a stream that can be read only once into a file, which can be read again.

    Args:
        stream: standard input.
        path: the file, made anew.
        report: told the bytes of each block.

    Raises:
        UserError: the stream cannot be read.
    """
    with path.open("wb") as file:
        while True:
            try:
                block = stream.read(2**20)
            except OSError as error:
                raise UserError(
                    f"{STDIN}: standard input cannot be read ({error.strerror}); pipe text into this command"
                ) from None
            if not block:
                return
            file.write(block)
            report(len(block))
