"""New folders that appear as a whole or not at all: for conversions, merges, shuffles and exports of weights.

Everything is written into a temporary folder beside the final one, and that is renamed at the end. A killed run leaves its temporary
folder, `NAME.mm-data.partial`, which the next run with the same target removes.
"""

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from minimind_data.dataset.format import MANIFEST_NAME, TOKENIZER_CONFIG_NAME, TOKENIZER_NAME, Manifest
from minimind_data.errors import UserError
from minimind_data.files import (
    PARTIAL_SUFFIX,
    FolderLock,
    fsync_folder,
    is_disk_full,
    naming,
    user_error_on_full_disk,
)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `out` when the block ends and is removed when the block raises.

    The block flushes the files that it writes to the disk, for which there are `durable_file` and `place_file`.

    Raises:
        UserError: `out` is not empty or cannot be written to, another run is making it, or the disk is full.
    """
    # `resolve` would follow a link, and the folder would be made beside the link's target.
    out = Path(os.path.abspath(out))  # noqa: PTH100
    _check_free(out)
    # A name that nobody else uses, since a folder of this name is removed without asking.
    partial = out.with_name(f"{out.name}.mm-data{PARTIAL_SUFFIX}")
    lock = FolderLock(
        out.with_name(f".{out.name}.lock"),
        f"{out}: another run is writing there; wait for it or take another `out`",
    )
    with user_error_on_full_disk(out):
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            lock.__enter__()
        except OSError as error:
            if is_disk_full(error):
                raise
            raise UserError(
                f"cannot be written ({error.strerror})",
                where=out,
                remedy="take another folder with `out`",
                option="out",
            ) from None
        try:
            _check_free(out)  # another run may have finished before this one got the lock
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            fsync_folder(partial)
            partial.replace(out)
            _flush_name(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            lock.__exit__(None, None, None)


def _flush_name(out: Path) -> None:
    """Make the name of a folder durable that is there and complete."""
    try:
        fsync_folder(out.parent)
    except OSError as error:
        raise UserError(
            f"cannot be flushed to the disk ({error.strerror})",
            where=out.parent,
            remedy=f"{out} is complete, but make sure that it is still there after a power cut",
        ) from None


def _check_free(out: Path) -> None:
    if out.is_mount():
        raise UserError(
            "a mount point, which no folder can be renamed to",
            where=out,
            remedy="name a folder inside it",
            option="out",
        )
    if out.is_dir():
        if any(out.iterdir()):
            raise UserError(
                "not empty", where=out, remedy="take another `out`, or delete that folder", option="out"
            )
        if out.is_symlink():
            raise UserError(
                "a link, which no folder can be renamed to",
                where=out,
                remedy="name a folder inside the one that it leads to",
                option="out",
            )
    elif out.exists() or out.is_symlink():
        raise UserError("a file", where=out, remedy="name a new folder with `out`", option="out")


@contextlib.contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """Open a new file for writing and flush it to the disk at the end."""
    with naming(path), path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def place_file(source: Path, target: Path, *, copy: bool) -> None:
    """Give a finished file a second name: by a hard link, or by a copy where that is impossible.

    Args:
        source: a file that is never written to again; this toolkit replaces its files and never edits them.
        target: the second name.
        copy: copy in any case.
    """
    if not copy:
        try:
            os.link(source, target)
        except OSError as error:  # another disk, or a file system without hard links
            if is_disk_full(error):
                raise
        else:
            return
    with source.open("rb") as reader, durable_file(target) as writer:
        shutil.copyfileobj(reader, writer, 4 * 2**20)


def write_metadata(folder: Path, manifest: Manifest, tokenizer: Path | bytes) -> None:
    """Write the tokenizer and, last, the manifest, which makes the folder a dataset.

    Args:
        folder: of the dataset.
        manifest: of the dataset.
        tokenizer: the folder with tokenizer.json, and tokenizer_config.json where the manifest names one; or the bytes of tokenizer.json.
    """
    tokenizer_json = tokenizer if isinstance(tokenizer, bytes) else (tokenizer / TOKENIZER_NAME).read_bytes()
    files = [(TOKENIZER_NAME, tokenizer_json), (MANIFEST_NAME, manifest.to_json().encode())]
    if manifest.tokenizer_config_sha256 is not None and isinstance(tokenizer, Path):
        files.insert(0, (TOKENIZER_CONFIG_NAME, (tokenizer / TOKENIZER_CONFIG_NAME).read_bytes()))
    for name, data in files:
        with durable_file(folder / name) as file:
            file.write(data)


def unique_names(names: Sequence[str]) -> list[str]:
    """Return these names made unique: the second `a` becomes `a~2`, or `a~` with the next number that is free."""
    targets = set(names)
    names_so_far: set[str] = set()
    unique = []
    for name in names:
        free = (f"{name}~{count}" for count in itertools.count(2) if f"{name}~{count}" not in targets)
        unique.append(name if name not in names_so_far else next(free))
        names_so_far.add(name)
        targets.add(unique[-1])
    return unique
