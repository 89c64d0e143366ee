"""Which files inputs stand for (files, folders, globs and object stores), and what form each of them has.

The content decides if a form or a compression has a magic number, otherwise the name does. A file that neither says anything about is
refused, unless it begins as JSON lines do.

Sources of the magic numbers: RFC 1952 (gzip), RFC 8878 (zstd), the Apache Parquet format specification.
"""

import contextlib
import glob
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from minimind_data.errors import UserError
from minimind_data.inputs import stores
from minimind_data.inputs.delimited import BYTE_ORDER_MARK
from minimind_data.inputs.forms import AUTO, FORMS, FormChoice, titles
from minimind_data.inputs.jsonl import CSV_REMEDY
from minimind_data.inputs.sources import STDIN, Compression, Source
from minimind_data.json_fields import as_file_name

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
"""Of forms that are not read here; such a file gets an error of its own."""
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_SUFFIXES = {suffix: name for name, entry in FORMS.items() for suffix in entry.suffixes}
_GLOB = re.compile(r"[*?\[]")
_HEAD_BYTES = 4096
_MAX_STEM_BYTES = 160  # file systems take 255, and what a build appends takes some 50


def find_sources(inputs: Sequence[str], form: FormChoice = AUTO) -> tuple[list[Source], list[str]]:
    """Find the files that inputs name, in order, and the form of each.

    Args:
        inputs: paths, folders, globs and URIs. A folder or a glob stands for its files sorted by name.
        form: of all of them; `auto` detects it for each.

    Returns:
        (the sources, notes for the user about files of a folder that were left out).

    Raises:
        UserError: an input is missing, empty, no file, named twice, or of unknown form.
    """
    sources: list[Source] = []
    notes: list[str] = []
    paths_by_name: dict[str, str] = {}
    for one in inputs:
        if one == STDIN:
            raise UserError(
                "-: standard input can be read once, and by tokenize alone", remedy="save it to a file first"
            )
        files, left_out = _files_of(one, form)
        if left_out:
            some = ", ".join(PurePosixPath(_shown(path)).name for path in left_out[:3])
            notes.append(
                f"{_shown(one)}: {len(left_out)} files of no known form are left out ({some}{', …' if len(left_out) > 3 else ''})"
            )
        for location in files:
            key = _shown(location) if stores.is_uri(location) else os.path.realpath(location)
            if key in paths_by_name:
                raise UserError(
                    f"named twice (by {paths_by_name[key]} and by {_shown(one)}); its documents would be doubled",
                    where=_shown(location),
                )
            paths_by_name[key] = _shown(one)
            sources.append(source_of(location, form))
    return sources, notes


def source_of(location: str, form: FormChoice = AUTO, *, name: str | None = None) -> Source:
    """Look at a file and detect its form.

    Args:
        location: a path or a URI.
        form: that it has; `auto` detects it.
        name: what messages and the manifest call it; by default the path, or the URI without its credentials.

    Raises:
        UserError: it is missing, empty, no file, or of unknown form.
    """
    source = Source(name=name or _shown(location), location=location, form=AUTO)
    check_is_file(source)
    with source.open() as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        raise UserError("the file is empty; there is nothing to tokenize", where=source.name)
    try:
        source.name.encode()
    except UnicodeEncodeError:
        raise UserError(
            "the name is no UTF-8, so a manifest cannot hold it", where=source.name, remedy="rename the file"
        ) from None
    compression = next((kind for magic, kind in _COMPRESSIONS.items() if head.startswith(magic)), None)
    if compression is not None:
        source = replace(source, compression=compression)
        with source.reading(), source.open_text() as text:
            head = text.read(_HEAD_BYTES)
        if not head:
            raise UserError(
                "nothing is in it once decompressed; there is nothing to tokenize", where=source.name
            )
    return replace(source, form=_form_in(source, head, form))


def _form_in(source: Source, head: bytes, choice: FormChoice) -> str:
    """Return the form of a source whose text begins with `head`."""
    name = source.name
    if head.startswith(_LFS_POINTER):
        raise UserError(f"{name}: a Git LFS pointer, not the file itself; get it with `git lfs pull`")
    by_magic = next(
        (form for form, entry in FORMS.items() if entry.magic and head.startswith(entry.magic)), None
    )
    if by_magic is None:
        other = next((kind for magic, kind in _OTHER_MAGICS.items() if head.startswith(magic)), None)
        if other is not None:
            raise UserError(
                f"a {other} file", where=name, remedy=f"unpack it, or write it as {titles(joined_by='or')}"
            )
    elif source.compression is not None and not FORMS[by_magic].may_be_compressed:
        title = FORMS[by_magic].title
        raise UserError(
            f"a compressed {title} file", where=name, remedy=f"decompress it, for {title} is read in parts"
        )
    elif choice in (AUTO, by_magic):
        return by_magic
    form = _form_by_name(name) or _form_by_start(head) if choice == AUTO else choice
    if form is None:
        if PurePosixPath(name.lower()).suffix in (".csv", ".tsv"):
            raise UserError(f"{name}: {CSV_REMEDY}")
        raise UserError(
            "its form cannot be told", where=name, remedy=f"say `format` {', '.join(FORMS)}", option="format"
        )
    entry = FORMS[form]
    if entry.magic:
        magic = entry.magic.decode()
        raise UserError(
            f"no {entry.title} file, whatever its name says (it should begin with {magic})", where=name
        )
    if why := entry.objection(head):
        raise UserError(why, where=name)
    return form


def _form_by_name(name: str) -> str | None:
    """Return the form that the suffix of a name stands for; None if it stands for none."""
    base = name.lower()
    for suffix in _COMPRESSION_SUFFIXES:
        base = base.removesuffix(suffix)
    return _SUFFIXES.get(PurePosixPath(base).suffix)


def _form_by_start(head: bytes) -> str | None:
    """Return the form that a text with this beginning most likely has; None if none is likely."""
    start = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    likely = ((form, entry.likely_start) for form, entry in FORMS.items() if entry.likely_start)
    return next((form for form, first in likely if start.startswith(first)), None)


def stem_of(source: Source) -> str:
    """Return the name of a source's shards: that of its file without the suffixes of compression and form."""
    if source.name == STDIN:
        return "stdin"
    name = stores.name_of(source.name) if stores.is_uri(source.name) else PurePosixPath(source.name).name
    for suffixes in (_COMPRESSION_SUFFIXES, _SUFFIXES):
        for suffix in suffixes:
            if name.lower().endswith(suffix) and len(name) > len(suffix):
                name = name[: -len(suffix)]
                break
    return as_file_name(name.encode()[:_MAX_STEM_BYTES].decode(errors="ignore"))


def _files_of(one: str, form: FormChoice) -> tuple[list[str], list[str]]:
    """Return (files, files left out) that one input stands for."""
    if stores.is_uri(one):
        files, is_folder = stores.files(one)
        return _of_known_form(one, files, form) if is_folder else (files, [])
    try:
        path = Path(one)
        if path.is_dir():
            return _of_known_form(one, _below(path), form)
        if not path.exists() and _GLOB.search(one):
            matches = sorted(match for match in glob.glob(one, recursive=True) if not Path(match).is_dir())  # noqa: PTH207 - from cwd or root
            if not matches:
                raise UserError("no file matches", where=one)
            return matches, []
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else one
        raise UserError(
            f"cannot be looked into ({error.strerror})",
            where=where,
            remedy="mend that, or name the files that matter",
        ) from None
    return [one], []


def _below(folder: Path) -> list[str]:
    """Return the files in a folder and its folders, in order, those with a dot in front left out.

    Links are followed, each folder is seen once. What cannot be listed is an error, for its files would be missing.
    """

    def refuse(error: OSError) -> None:
        raise error

    files: list[str] = []
    visited = {os.path.realpath(folder)}
    for place, folders, names in os.walk(str(folder), onerror=refuse, followlinks=True):
        files += [str(Path(place, name)) for name in names if not name.startswith(".")]
        visible = sorted(name for name in folders if not name.startswith("."))
        folders.clear()
        for name in visible:
            real = os.path.realpath(Path(place, name))
            if real not in visited:
                visited.add(real)
                folders.append(name)
    return sorted(files)


def _of_known_form(folder: str, files: list[str], form: FormChoice) -> tuple[list[str], list[str]]:
    """Return (files, files left out) of a folder, by the suffixes of their names."""
    if form != AUTO:
        known, left_out = files, []
    else:
        known = [file for file in files if _form_by_name(_shown(file))]
        left_out = [file for file in files if not _form_by_name(_shown(file))]
    if not known:
        raise UserError(
            f"a folder without any file of a known form ({', '.join(sorted(_SUFFIXES))}, also .gz or .zst)",
            where=_shown(folder),
        )
    return known, left_out


def _shown(location: str) -> str:
    """Return a path as it is and a URI without its credentials."""
    return stores.shown(location) if stores.is_uri(location) else location


def check_is_file(source: Source) -> None:
    """Check that a source on this machine is a file, before it is opened.

    Raises:
        UserError: it is a folder, a pipe or a device.
    """
    if source.is_remote:
        return
    name, path = source.name, Path(source.location)
    with contextlib.suppress(OSError):  # opening it will say
        if path.is_dir():
            raise UserError("a folder, where a file is needed", where=name)
        if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
            raise UserError(
                "a pipe or a device, which cannot be read twice",
                where=name,
                remedy="save it to a file, or pipe it into `-`",
            )
