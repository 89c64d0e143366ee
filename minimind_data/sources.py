"""Where records come from: files, folders, globs and object stores, and the form that each file has.

A form is told by content first (compressed files and Parquet have a magic number) and then by name; what neither tells is
refused, not guessed. Object stores (`s3://`, `gs://`, …) are read through pyarrow's file systems, with their credentials and
settings from the environment; what they hold is read in ranges, never fetched whole.

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
from typing import Any, BinaryIO, Literal, cast, get_args

from minimind_data.errors import UserError

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
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_GLOB = re.compile(r"[*?\[]")
_HEAD_BYTES = 4096
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
        name = PurePosixPath(self.name.split("?")[0]).name
        for suffixes in (_COMPRESSION_SUFFIXES, tuple(_FORMS)):
            for suffix in suffixes:
                if name.lower().endswith(suffix) and len(name) > len(suffix):
                    name = name[: -len(suffix)]
                    break
        return name

    @property
    def is_remote(self) -> bool:
        """Whether it lies in an object store."""
        return bool(_URI.match(self.location))

    def is_absolute(self) -> bool:
        """Tell whether it can be opened from any working directory."""
        return self.is_remote or Path(self.location).is_absolute()

    def absolute(self) -> "Source":
        """Return the same source, to be opened from any working directory."""
        if _URI.match(self.location):
            return self
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
        if not _URI.match(self.location):
            status = Path(self.location).stat()
            return status.st_size, status.st_mtime_ns
        filesystem, path = _filesystem(self.location)
        found = filesystem.get_file_info(path)
        return int(found.size or 0), int(found.mtime_ns or 0)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Turn what goes wrong with its bytes inside the block into a sentence about it."""
        try:
            yield
        except Exception as error:
            if not _is_of_reading(error):
                raise
            what = "damaged or cut off" if self.compression or self.form == "parquet" else "cannot be read"
            raise UserError(f"{self.name}: {what} ({_first_line(error)}); get it again") from None


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
        files, left_out = _files_of(given, form)
        if left_out:
            some = ", ".join(PurePosixPath(path).name for path in left_out[:3])
            notes.append(
                f"{given}: {len(left_out)} files of no known form are left out ({some}{', …' if len(left_out) > 3 else ''})"
            )
        for location in files:
            key = location if _URI.match(location) else os.path.realpath(location)
            if key in taken:
                raise UserError(
                    f"{location}: named twice (by {taken[key]} and by {given}); its documents would be doubled"
                )
            taken[key] = given
            sources.append(tell(location, form))
    return sources, notes


def tell(location: str, form: Format = "auto", *, name: str | None = None) -> Source:
    """Look at a file and say what form it has.

    Raises:
        UserError: it is missing, empty, no file, or its form cannot be told.
    """
    shown = name or _without_credentials(location)
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
    told = _form_of(shown, head, form, compressed=compression is not None)
    return Source(name=shown, location=location, form=told, compression=compression)


def _form_of(name: str, head: bytes, wanted: Format, *, compressed: bool) -> Form:
    other = next((kind for magic, kind in _OTHER_MAGICS.items() if head.startswith(magic)), None)
    if other is not None:
        raise UserError(f"{name}: a {other} file; unpack it, or write it as JSON lines, Parquet or text")
    is_parquet = head.startswith(_PARQUET_MAGIC)
    if is_parquet and compressed:
        raise UserError(f"{name}: a compressed Parquet file; decompress it, Parquet compresses by itself")
    if is_parquet and wanted in ("auto", "parquet"):
        return "parquet"
    base = name.lower()
    for suffix in _COMPRESSION_SUFFIXES:
        base = base.removesuffix(suffix)
    by_name = _FORMS.get(PurePosixPath(base.split("?")[0]).suffix)
    form = by_name if wanted == "auto" else wanted
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
    if _URI.match(given):
        return _remote_files(given, form)
    path = Path(given)
    if path.is_dir():
        found = sorted(
            str(file)
            for file in path.rglob("*")
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        return _known(given, found, form)
    if not path.exists() and _GLOB.search(given):
        matches = sorted(one for one in glob.glob(given, recursive=True) if not Path(one).is_dir())  # noqa: PTH207 - from cwd or root
        if not matches:
            raise UserError(f"{given}: no file matches")
        return matches, []
    return [given], []


def _known(given: str, found: list[str], form: Format) -> tuple[list[str], list[str]]:
    if form != "auto":
        known, left_out = found, []
    else:
        known = [file for file in found if _has_known_name(file)]
        left_out = [file for file in found if not _has_known_name(file)]
    if not known:
        raise UserError(
            f"{given}: a folder without any file of a known form ({', '.join(sorted(_FORMS))}, also .gz or .zst)"
        )
    return known, left_out


def _has_known_name(file: str) -> bool:
    base = file.lower()
    for suffix in _COMPRESSION_SUFFIXES:
        base = base.removesuffix(suffix)
    return PurePosixPath(base).suffix in _FORMS


def _remote_files(given: str, form: Format) -> tuple[list[str], list[str]]:
    location, _, query = given.partition("?")
    from pyarrow import fs  # noqa: PLC0415 - takes a tenth of a second

    # In a URI with a query, `?` begins it; `*` and `[` remain for globs.
    wild = re.search(r"[*\[]", location)
    with _remote(given):
        if wild:
            folder = location[: location.rfind("/", 0, wild.start()) + 1]
            filesystem, path = _filesystem(_with_query(folder, query))
            _, pattern = _filesystem(_with_query(location, query), check=False)
            listed = filesystem.get_file_info(fs.FileSelector(path.rstrip("/"), recursive=True))
            names = [one.path for one in listed if one.type == fs.FileType.File]
            matches = sorted(one for one in names if PurePosixPath(one).match(pattern))
            if not matches:
                raise UserError(f"{_without_credentials(given)}: no file matches")
            return [_with_query(_uri_of(location, one), query) for one in matches], []
        filesystem, path = _filesystem(given)
        found = filesystem.get_file_info(path)
        if found.type == fs.FileType.NotFound:
            raise UserError(f"{_without_credentials(given)}: no such file")
        if found.type == fs.FileType.File:
            return [given], []
        listed = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
        names = sorted(one.path for one in listed if one.type == fs.FileType.File)
        known, left_out = _known(_without_credentials(given), names, form)
        return [_with_query(_uri_of(location, one), query) for one in known], left_out


def _uri_of(uri: str, path: str) -> str:
    """Return the URI of another file of the same store; its path includes the bucket."""
    scheme, rest = uri.split("://", 1)
    credentials = rest.rpartition("@")[0] if "@" in rest.split("/")[0] else ""
    return f"{scheme}://{credentials}{'@' if credentials else ''}{path}"


def _with_query(uri: str, query: str) -> str:
    return f"{uri}?{query}" if query else uri


def _without_credentials(location: str) -> str:
    if not _URI.match(location):
        return location
    scheme, rest = location.split("?", maxsplit=1)[0].split("://", 1)
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def _filesystem(uri: str, *, check: bool = True) -> tuple[Any, str]:
    """Return pyarrow's file system for a URI, and the path in it."""
    from pyarrow import fs  # noqa: PLC0415 - takes a tenth of a second

    if not check:
        uri = uri.replace("*", "%2A").replace("[", "%5B").replace("]", "%5D")
    with _remote(uri):
        filesystem, path = fs.FileSystem.from_uri(uri)
        return filesystem, path if check else path.replace("%2A", "*").replace("%5B", "[").replace("%5D", "]")


@contextlib.contextmanager
def _remote(uri: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not _is_of_reading(error):
            raise
        raise UserError(
            f"{_without_credentials(uri)}: cannot be reached ({_first_line(error)}); check the address, the credentials and the "
            "region"
        ) from None


def _check_is_file(location: str, name: str) -> None:
    if _URI.match(location):
        return
    path = Path(location)
    if path.is_dir():
        raise UserError(f"{name}: a folder, where a file is needed")
    if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
        raise UserError(
            f"{name}: a pipe or a device, which cannot be read twice; save it to a file, or pipe it into `-`"
        )


def _open(location: str, name: str) -> BinaryIO:
    if _URI.match(location):
        filesystem, path = _filesystem(location)
        with _remote(location):
            return cast("BinaryIO", filesystem.open_input_file(path))
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


def _is_of_reading(error: Exception) -> bool:
    """Tell an error of the system or of pyarrow from everything else; pyarrow's have several unrelated bases."""
    if isinstance(error, BrokenPipeError):
        return False
    return isinstance(error, OSError) or type(error).__module__.startswith("pyarrow")


def _first_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__


def spool(stream: BinaryIO, path: Path, report: Callable[[int], None] = lambda _: None) -> None:
    """Copy a stream that can be read only once into a file, which can be read again.

    Args:
        stream: such as standard input.
        path: the file, made anew.
        report: told the bytes of each block.
    """
    with path.open("wb") as file:
        while block := stream.read(2**20):
            file.write(block)
            report(len(block))
