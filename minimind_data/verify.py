"""verify(): recompute every checksum of a dataset, so that a single flipped byte anywhere in it is found.

Opening a dataset checks names, sizes and headers and costs nothing; this reads every byte.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minimind_data.files import sha256_of
from minimind_data.format import (
    MANIFEST_NAME,
    REMAKE,
    REMAKE_ALL,
    RESTORE,
    SET_ASIDE_NAME,
    TOKENIZER_NAME,
    Manifest,
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What `verify` found."""

    files: int
    """Files that were read."""
    bytes: int
    problems: tuple[str, ...]
    """Which file, and what is wrong with it. Empty for a whole dataset."""
    remedies: tuple[str, ...]
    """What to do about them, each once."""


def dataset_bytes(folder: Path) -> int:
    """Return how many bytes `verify` will read."""
    return sum(
        file.path.stat().st_size for file in _files(folder, Manifest.read(folder)) if file.path.is_file()
    )


def verify(folder: Path, report: Callable[[int], None] = lambda _: None) -> Verdict:
    """Hold every file of a dataset against its checksum.

    Args:
        folder: the dataset.
        report: told the bytes of each file as it is done.

    Raises:
        FormatError: there is no readable manifest to hold anything against.
    """
    manifest = Manifest.read(folder)
    files = _files(folder, manifest)
    problems: list[str] = []
    remedies: dict[str, None] = {}
    num_bytes = 0
    for file in files:
        try:
            found = sha256_of(file.path)
            size = file.path.stat().st_size
        except FileNotFoundError:
            problems.append(f"{file.path}: missing")
            remedies[file.remedy] = None
            continue
        num_bytes += size
        report(size)
        if found != file.sha256:
            problems.append(f"{file.path}: SHA-256 {found[:12]}…, where it should be {file.sha256[:12]}…")
            remedies[file.remedy] = None
    return Verdict(files=len(files), bytes=num_bytes, problems=tuple(problems), remedies=tuple(remedies))


@dataclass(frozen=True)
class _File:
    """A file of a dataset, what it should be, and what mends it."""

    path: Path
    sha256: str
    remedy: str


def _files(folder: Path, manifest: Manifest) -> list[_File]:
    manifest_sha256 = hashlib.sha256(manifest.to_json().encode()).hexdigest()
    files = [
        _File(folder / MANIFEST_NAME, manifest_sha256, RESTORE),
        _File(folder / TOKENIZER_NAME, manifest.tokenizer.sha256, RESTORE),
    ]
    for entry in manifest.shards:
        files.append(_File(folder / f"{entry.name}.bin", entry.sha256, REMAKE))
        files.append(_File(folder / f"{entry.name}.idx", entry.index_sha256, REMAKE))
    if manifest.set_aside_sha256 is not None:
        files.append(_File(folder / SET_ASIDE_NAME, manifest.set_aside_sha256, REMAKE_ALL))
    return files
