"""Files that are whole or absent: atomic writes, durable renames, and a lock that dies with its process.

Every file that this toolkit commits is written under a temporary name beside its place, flushed to the disk and renamed;
after a crash at any moment the name leads to all of the bytes or to none. Nothing here knows what the bytes mean.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Container, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from minimind_data.errors import UserError
from minimind_data.json_fields import shown
from minimind_data.reporting import Say

PARTIAL_SUFFIX = ".partial"

_HASH_BLOCK_BYTES = 4 * 2**20


def partial_name(path: Path) -> Path:
    """Return the temporary name for `path`: this process's own, so that another one that is still being killed cannot write to it."""
    return path.with_name(f"{path.name}.{_process_number(os.getpid())}{PARTIAL_SUFFIX}")


@functools.lru_cache
def _process_number(process_id: int) -> int:
    """Return a number that no other process has; the id alone will not do, since a process on another machine may have the same."""
    return process_id + (secrets.randbits(64) << 32)


def remove_partials(folder: Path, names: Container[str] | None = None) -> None:
    """Delete the temporary files that killed processes left in a folder; the caller holds the folder's lock.

    Args:
        folder: where they are.
        names: only those of files with these names. Without names the folder is taken to be this program's own, and everything with
            a temporary name is deleted, folders and their content too.
    """
    for path in folder.glob(f"*.*{PARTIAL_SUFFIX}"):
        name, process, _ = path.name.rsplit(".", 2)
        if not process.isdecimal():
            continue
        if names is None and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif names is None or name in names:
            path.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` (renames, new files) durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError that names no file this one: those about an open file, such as a full disk, name none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file to write to, which becomes `path` when the block ends and is removed when the block raises."""
    partial = partial_name(path)
    try:
        with naming(path), partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file as a whole or not at all: under a temporary name, flushed to the disk, renamed, the folder flushed too."""
    with whole_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def is_disk_full(error: OSError) -> bool:
    """Tell whether an error means that no more can be written: a full disk or quota, or a limit on the size of files."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_out_of_files(error: OSError) -> bool:
    """Tell whether an error means that this process, or the whole system, may open no more files."""
    return error.errno in (errno.EMFILE, errno.ENFILE)


MORE_FILES = "raise the limit on open files (`ulimit -n`)"
"""What to do where no more files can be opened."""


@contextlib.contextmanager
def user_error_on_full_disk(folder: Path) -> Iterator[None]:
    """Raise a UserError where the disk is full at any moment inside the block, or no more files can be opened.

    Args:
        folder: what is written there, and where everything that was finished stays.
    """
    try:
        yield
    except OSError as error:
        if is_out_of_files(error):
            raise UserError(
                f"cannot be opened ({error.strerror})",
                where=error.filename or folder,
                remedy=f"everything that was finished is kept, so {MORE_FILES} and run the same command again",
            ) from None
        if not is_disk_full(error):
            raise
        what, remedy = ("the disk is full", "free some space")
        if error.errno == errno.EFBIG:
            what, remedy = ("the limit on the size of files is reached", "raise it (`ulimit -f`)")
        raise UserError(
            what,
            where=folder,
            remedy=f"everything that was finished is kept, so {remedy} and run the same command again",
        ) from None


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return sha256_of_stream(file)


def sha256_of_stream(file: BinaryIO, start: int = 0, stop: int | None = None) -> str:
    """Return the hexadecimal SHA-256 of the bytes [start, stop) of an open file, by default up to its end."""
    digest = hashlib.sha256()
    file.seek(start)
    remaining = None if stop is None else stop - start
    while block := file.read(_HASH_BLOCK_BYTES if remaining is None else min(remaining, _HASH_BLOCK_BYTES)):
        digest.update(block)
        if remaining is not None:
            remaining -= len(block)
    return digest.hexdigest()


def sha256_of_bytes(data: bytes) -> str:
    """Return the hexadecimal SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def checksum_of_json(content: dict[str, Any]) -> str:
    """Return the hexadecimal SHA-256 of the content of a JSON file, however the file is laid out.

    Keys and values are those of JSON; tuples count as lists.
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def parse_json(text: bytes | str) -> Any:
    """Parse JSON that may come from anywhere.

    Raises:
        ValueError: it is no JSON, or its lists and objects are nested too deeply to be parsed.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its lists and objects are nested too deeply") from None


class DamagedFileError(UserError):
    """A file that `write_checked` wrote holds something else now."""

    problem = ""
    """How that shows, such as `its checksum does not fit`."""

    @classmethod
    def of(cls, path: Path, problem: str, remedy: str | None) -> Self:
        """Return the error for a file."""
        error = cls(f"edited or damaged ({problem})", where=path, remedy=remedy)
        error.problem = problem
        return error


def checked_json(content: dict[str, Any], *, key: str) -> str:
    """Return the text of a JSON file that ends with its own checksum under `key`, so that any change of its content is found."""
    return json.dumps({**content, key: checksum_of_json(content)}, ensure_ascii=False, indent=1) + "\n"


def write_checked(path: Path, content: dict[str, Any], *, key: str) -> None:
    """Write JSON with its own checksum under `key`, as a whole or not at all; `read_checked` reads it."""
    # A file name that is not UTF-8 holds lone surrogates, which UTF-8 cannot encode; their backslash escapes are JSON's too.
    write_atomic(path, checked_json(content, key=key).encode(errors="backslashreplace"))


def read_checked(
    path: Path, *, key: str, remedy: str | None = None, version: int | None = None
) -> dict[str, Any]:
    """Read what `write_checked` wrote, without the checksum.

    Args:
        path: the file.
        key: what its checksum is called.
        remedy: what the user can do if it is damaged.
        version: the `format_version` that it must have, which is checked before the checksum; None checks no version.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such file.
        DamagedFileError: it is not what was written.
        UserError: it cannot be read for want of permission or because too many files are open, or has another version.
    """
    try:
        content = parse_json(path.read_bytes())
        checksum = content.pop(key, None) if isinstance(content, dict) else None
        fits = checksum is not None and checksum == checksum_of_json(content)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except PermissionError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=path, remedy="make it readable") from None
    except OSError as error:
        if is_out_of_files(error):
            raise UserError(f"cannot be opened ({error.strerror})", where=path, remedy=MORE_FILES) from None
        raise DamagedFileError.of(path, f"cannot be read: {error.strerror}", remedy) from None
    except (ValueError, RecursionError) as error:
        raise DamagedFileError.of(path, f"no JSON: {error}", remedy) from None
    if not isinstance(content, dict):
        raise DamagedFileError.of(path, "no JSON object", remedy)
    if version is not None and content.get("format_version", version) != version:
        raise UserError(
            f"format version {shown(content['format_version'])}; this program reads version {version}",
            where=path,
            remedy="use the program that wrote it",
        )
    if not fits:
        raise DamagedFileError.of(path, "its checksum does not fit", remedy)
    return content


def is_locked(path: Path) -> bool:
    """Tell whether a process holds a `FolderLock` with this file alone; False where there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


class FolderLock:
    """A lock file that one process at a time can hold; the kernel releases it when that process ends, however it ends.

    Args:
        path: the lock file, which is created on entering and removed on leaving.
        busy: the sentence for the user whose process comes second.
        shared: let other processes hold the lock too, if they also share it.
        wait: takes the sentence `busy`, after which the lock is waited for; without this, a process that comes second is refused.

    Raises:
        UserError: another process holds the lock (at once, unless `wait` is given), or a file of somebody else stands there.
    """

    def __init__(self, path: Path, busy: str, *, shared: bool = False, wait: Say | None = None) -> None:
        self._path = path
        self._busy = busy
        self._kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._wait = wait
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        while True:
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                descriptor = os.open(self._path, flags, 0o644)
            except OSError as error:
                if is_disk_full(error):
                    raise
                folder = self._path.parent
                raise UserError(
                    f"cannot be written ({error.strerror})",
                    where=folder,
                    remedy="make it writable, or take another folder",
                ) from None
            if os.fstat(descriptor).st_size:  # it would be removed in the end
                os.close(descriptor)
                raise UserError(
                    "a file with content, where the program's own lock has its place",
                    where=self._path,
                    remedy="move it away",
                )
            try:
                fcntl.flock(descriptor, self._kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if self._wait is None:
                    os.close(descriptor)
                    raise UserError(self._busy) from None
                self._wait_for(descriptor, self._wait)
            if self._is_still_there(descriptor):
                self._descriptor = descriptor
                return self
            # Its last holder removed this file after we had opened it and before we locked it.
            os.close(descriptor)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._descriptor is not None
        try:
            # Where other processes still share the lock, the last of them removes the file; one that cannot be removed locks nobody out.
            with contextlib.suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._path.unlink(missing_ok=True)
        finally:  # also where Ctrl-C comes just here: this process would lock itself out
            os.close(self._descriptor)
            self._descriptor = None

    def _wait_for(self, descriptor: int, say: Say) -> None:
        try:
            say(self._busy)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except BaseException:
            os.close(descriptor)
            raise

    def _is_still_there(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.stat(descriptor), self._path.stat())
        except FileNotFoundError:
            return False
