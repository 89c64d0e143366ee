"""A folder that appears whole or not at all, for what is made in one go: conversions, merges, shuffles, exports of weights.

Everything is written into a folder beside its place and that folder is renamed at the end. What a killed run leaves is
called `NAME.mm-data.partial`; the next run for the same place removes it.
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
    user_error_on_full_disk,
)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to write into; it becomes `out` when the block ends, and vanishes when the block raises.

    The files in it must be flushed to the disk by whoever writes them; `durable_file` and `place_file` do so.

    Raises:
        UserError: `out` holds something already or cannot be made, another run is making it, or the disk is full.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 - `resolve` would follow a link and write beside its target
    _check_free(out)
    partial = out.with_name(f"{out.name}.mm-data{PARTIAL_SUFFIX}")  # nobody else's, for it is removed unasked
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
            _check_free(out)  # another run may have finished it while this one came to the lock
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            fsync_folder(partial)
            partial.replace(out)
            fsync_folder(out.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            lock.__exit__(None, None, None)


def _check_free(out: Path) -> None:
    if out.is_mount():
        raise UserError(f"{out}: a mount point, which no folder can be renamed to; name a folder inside it")
    if out.is_dir():
        if any(out.iterdir()):
            raise UserError(
                "not empty", where=out, remedy="take another `out`, or delete that folder", option="out"
            )
    elif out.exists() or out.is_symlink():
        raise UserError("a file", where=out, remedy="`out` names a folder that is to be made", option="out")


@contextlib.contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """Open a new file for writing and flush it to the disk at the end."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def place_file(source: Path, target: Path, *, copy: bool) -> None:
    """Put a committed file under another name: a second link to the same bytes, or a copy where that cannot be.

    Args:
        source: a file that nobody writes into any more; this toolkit replaces its files, it never edits them.
        target: the new name.
        copy: never link.
    """
    if not copy:
        try:
            os.link(source, target)
        except OSError as error:  # another disk, or a file system without links
            if is_disk_full(error):
                raise
        else:
            return
    with source.open("rb") as reader, durable_file(target) as writer:
        shutil.copyfileobj(reader, writer, 4 * 2**20)


def write_metadata(folder: Path, manifest: Manifest, tokenizer: Path | bytes) -> None:
    """Write the tokenizer and then the manifest, which makes the folder a dataset.

    Args:
        folder: where to.
        manifest: the dataset's.
        tokenizer: the folder that has it, with its chat template where the manifest names one; or what its file holds.
    """
    tokenizer_json = tokenizer if isinstance(tokenizer, bytes) else (tokenizer / TOKENIZER_NAME).read_bytes()
    files = [(TOKENIZER_NAME, tokenizer_json), (MANIFEST_NAME, manifest.to_json().encode())]
    if manifest.tokenizer_config_sha256 is not None and isinstance(tokenizer, Path):
        files.insert(0, (TOKENIZER_CONFIG_NAME, (tokenizer / TOKENIZER_CONFIG_NAME).read_bytes()))
    for name, data in files:
        with durable_file(folder / name) as file:
            file.write(data)


def unique_names(names: Sequence[str]) -> list[str]:
    """Return names of which no two are the same: the second `a` becomes `a~2`, or the next number that is free."""
    taken = set(names)
    seen: set[str] = set()
    unique = []
    for name in names:
        free = (f"{name}~{count}" for count in itertools.count(2) if f"{name}~{count}" not in taken)
        unique.append(name if name not in seen else next(free))
        seen.add(name)
        taken.add(unique[-1])
    return unique
