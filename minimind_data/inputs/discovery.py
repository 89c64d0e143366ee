"""Which files inputs stand for (files, folders, globs and object stores), and what form each of them has.

The content decides if a form or a compression has a magic number, otherwise the name does. A file that neither says anything about is
refused, unless it begins as JSON lines do.

Sources of the magic numbers: RFC 1952 (gzip), RFC 8878 (zstd), the Apache Parquet format specification.
"""

import codecs
import contextlib
import glob
import os
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from minimind_data.dataset.format import check_name
from minimind_data.errors import UserError
from minimind_data.inputs import stores
from minimind_data.inputs.delimited import BYTE_ORDER_MARK
from minimind_data.inputs.forms import AUTO, FORMS, FormChoice, titles
from minimind_data.inputs.hub_folders import HeldOutFile, HubFolder, hub_folder
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
_WIDE_BYTES = 64
_MAX_STEM_BYTES = 160  # file systems take 255, and what a build appends takes some 50


@dataclass(frozen=True, kw_only=True)
class PastInput:
    """An input that a dataset, or a build of one, has already."""

    path: str
    """As its manifest or plan has it."""
    num_bytes: int | None = None
    """Its size; None of an unfinished build, whose plan does not record it."""


def find_sources(
    inputs: Sequence[str],
    form: FormChoice = AUTO,
    *,
    past: Sequence[PastInput] = (),
    takes_stdin: bool = False,
) -> tuple[list[Source], list[str]]:
    """Find the files that inputs name, in order, and the form of each.

    Args:
        inputs: paths, folders, globs and URIs. A folder or a glob stands for its files sorted by name.
        form: of all of them; `auto` detects it for each.
        past: what the dataset has already: these files of a folder stay inputs, also where they would be left out today.
        takes_stdin: whether `-` may be named once; its source is a placeholder with that name and location.

    Returns:
        (the sources, notes for the user about files of a folder that were left out).

    Raises:
        UserError: an input is missing, empty, no file, named twice, or of unknown form.
    """
    sources: list[Source] = []
    notes: list[str] = []
    paths_by_name: dict[str, str] = {}
    listings = []
    for one in inputs:
        if one != STDIN:
            listings.append(_files_of(one, form))
        elif takes_stdin and inputs.count(STDIN) == 1:
            listings.append(_Listing(files=[STDIN]))
        else:
            raise UserError(
                "-: standard input can be read once, and by tokenize alone", remedy="save it to a file first"
            )
    named = {_key(file) for listing in listings for file in listing.files}
    for one, listing in zip(inputs, listings, strict=True):
        for location in _with_past(_shown(one), listing, past, named, notes):
            if location == STDIN:
                sources.append(Source(name=STDIN, location=STDIN, form=AUTO))
                continue
            key = _key(location)
            if key in paths_by_name:
                raise UserError(
                    f"named twice (by {paths_by_name[key]} and by {_shown(one)}); its documents would be doubled",
                    where=_shown(location),
                )
            paths_by_name[key] = _shown(one)
            sources.append(source_of(location, form))
    return sources, notes


def _key(location: str) -> str:
    """Return what two ways to name a file have in common."""
    return _shown(location) if stores.is_uri(location) else os.path.realpath(location)


def _with_past(
    one: str, listing: "_Listing", past: Sequence[PastInput], named: Container[str], notes: list[str]
) -> list[str]:
    """Return the files that an input stands for, those included that it would not have today but the dataset has; add notes on the others.

    Args:
        one: the input, as messages show it.
        listing: its files.
        past: what the dataset has.
        named: the keys of all files that the inputs stand for without these.
        notes: for the user.
    """
    # An unfinished build may have stopped at metadata, and would again.
    finished = [file for file in past if file.num_bytes is not None]
    stay = {file for file in listing.metadata if _is_past(file, PurePosixPath(one), finished)}
    stay |= {file.location for file in listing.held_out if _is_past(file.location, PurePosixPath(one), past)}
    stay = {file for file in stay if _key(file) not in named}
    metadata = [file for file in listing.metadata if file not in stay]
    if listing.unknown:
        notes.append(
            f"{one}: {len(listing.unknown)} files of no known form are left out ({_some(listing.unknown)})"
        )
    if metadata:
        notes.append(f"{one}: left out as metadata of the dataset: {_some(metadata)}")
    if stay:
        notes.append(
            f"{one}: kept, as the dataset has it; a new one would leave it out: {_some(sorted(stay))}"
        )
    patterns: dict[tuple[str, str], list[str]] = {}
    for file in listing.held_out:
        if file.location not in stay and _key(file.location) not in named:
            patterns.setdefault((file.split, file.pattern), []).append(file.location)
    for (split, pattern), files in patterns.items():
        name = _shown(files[0]) if len(files) == 1 else pattern
        notes.append(
            f"{one}: left out as the split {split}: {_some(files)}; to train on it too, name '{name}' beside the folder"
        )
    if not listing.files and not stay and patterns:
        raise UserError(
            f"a dataset folder without a split for training (its files are of {' and '.join(sorted({split for split, _ in patterns}))})",
            where=one,
            remedy=f"name files or a glob, such as '{next(iter(patterns))[1]}', to train on them",
        )
    return sorted({*listing.files, *stay}) if stay else listing.files


def _some(files: Sequence[str]) -> str:
    """Return the names of the first of some files, for a message."""
    return ", ".join([PurePosixPath(_shown(file)).name for file in files[:3]] + ["…"] * (len(files) > 3))


def _is_past(location: str, folder: PurePosixPath, past: Sequence[PastInput]) -> bool:
    """Tell whether a file of a folder is an input already: by its path or, where the folder was moved, by its place in it and its size."""
    name = _shown(location)
    tail = PurePosixPath(name).relative_to(folder).parts
    for one in past:
        if one.path in (name, os.path.abspath(name)):  # noqa: PTH100 - as text
            return True
        if one.num_bytes is not None and PurePosixPath(one.path).parts[-len(tail) :] == tail:
            source = Source(name=name, location=location, form=AUTO)
            if source.stamp()[0] == one.num_bytes:
                return True
    return False


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
    check_name(source.name)
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
        _refuse_other_content(head, name)
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


def _refuse_other_content(head: bytes, name: str) -> None:
    """Refuse a file that begins as one of a form or an encoding that is not read here.

    Raises:
        UserError: it does.
    """
    other = next((kind for magic, kind in _OTHER_MAGICS.items() if head.startswith(magic)), None)
    if other is not None:
        raise UserError(
            f"a {other} file", where=name, remedy=f"unpack it, or write it as {titles(joined_by='or')}"
        )
    if (encoding := _wide_encoding(head)) is not None:
        raise UserError(
            f"looks like {encoding}, and text is read as UTF-8",
            where=name,
            remedy=f"convert it, as with `iconv -f {encoding} -t UTF-8`",
        )


def _wide_encoding(head: bytes) -> str | None:
    """Return the encoding of a text that begins so and has two or four bytes a character; None if it has not."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    # Without a mark: ASCII's characters, such as JSON's, have a zero byte on one side.
    first, second = head[:_WIDE_BYTES:2], head[1:_WIDE_BYTES:2]
    for encoding, other, zeros in (("UTF-16LE", first, second), ("UTF-16BE", second, first)):
        if 2 * zeros.count(0) > len(zeros) > 1 and not other.count(0):
            return encoding
    return None


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
    return as_file_name(name.encode(errors="replace")[:_MAX_STEM_BYTES].decode(errors="ignore"))


@dataclass(frozen=True, kw_only=True)
class _Listing:
    """The files that one input stands for."""

    files: list[str]
    unknown: list[str] = field(default_factory=list)
    """Files of a folder that have no known form."""
    metadata: list[str] = field(default_factory=list)
    """Files of a folder from a dataset hub that describe it."""
    held_out: list[HeldOutFile] = field(default_factory=list)
    """Files of a folder from a dataset hub that are not for training."""


def _files_of(one: str, form: FormChoice) -> _Listing:
    """List the files that one input stands for."""
    if stores.is_uri(one):
        files, is_folder = stores.files(one)
        return _of_folder(one, files, form) if is_folder else _Listing(files=files)
    try:
        path = Path(one)
        if path.is_dir():
            return _of_folder(one, _below(path), form)
        if not path.exists() and _GLOB.search(one):
            matches = sorted(match for match in glob.glob(one, recursive=True) if not Path(match).is_dir())  # noqa: PTH207 - from cwd or root
            if not matches:
                raise UserError("no file matches", where=one)
            return _Listing(files=matches)
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else one
        raise UserError(
            f"cannot be looked into ({error.strerror})",
            where=where,
            remedy="mend that, or name the files that matter",
        ) from None
    return _Listing(files=[one])


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


def _of_folder(folder: str, files: list[str], form: FormChoice) -> _Listing:
    """List the files of a folder, by their names."""
    hub = hub_folder(folder, files, _head_of) or HubFolder(data=files, metadata=[], held_out=[])

    def is_known(file: str) -> bool:
        return form != AUTO or _form_by_name(_shown(file)) is not None

    listing = _Listing(
        files=[file for file in hub.data if is_known(file)],
        unknown=[file for file in hub.data if not is_known(file)],
        metadata=hub.metadata,
        held_out=[file for file in hub.held_out if is_known(file.location)],
    )
    if not listing.files and not listing.held_out:
        suffixes = f"({', '.join(sorted(_SUFFIXES))}, also .gz or .zst)"
        if hub.metadata and any(file.endswith(".arrow") for file in map(_shown, files)):
            raise UserError(
                "a dataset as Hugging Face's save_to_disk writes it, in Arrow files, which are not read here",
                where=_shown(folder),
                remedy="write it by `load_from_disk(…).to_parquet(…)`",
            )
        raise UserError(f"a folder without any file of a known form {suffixes}", where=_shown(folder))
    return listing


def _head_of(location: str) -> bytes:
    """Return the first bytes of a file."""
    with Source(name=_shown(location), location=location, form=AUTO).open() as file:
        return file.read(_HEAD_BYTES)


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
