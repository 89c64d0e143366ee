"""The page cache: which files are in it, and how to drop them from it. Linux only."""

import ctypes
import gc
import mmap
import os
from pathlib import Path


def files_of(folder: Path) -> list[Path]:
    """Return all files under a folder."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def drop_pages(folder: Path) -> None:
    """Write dirty pages to disk and drop a folder's files from the page cache; they must not be mapped."""
    gc.collect()
    for path in files_of(folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def share_in_cache(folder: Path) -> float:
    """Return the share of the pages of a folder's files that is in the page cache."""
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    there = pages = 0
    for path in files_of(folder):
        size = path.stat().st_size
        if not size:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as view:
            flags = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
            address = ctypes.c_char.from_buffer(view)
            failed = mincore(ctypes.byref(address), ctypes.c_size_t(size), flags)
            del address
            if failed:
                raise OSError(ctypes.get_errno(), "mincore", str(path))
            there += sum(bytes(flags)) if max(flags) <= 1 else sum(flag & 1 for flag in flags)
            pages += len(flags)
    return there / max(1, pages)
