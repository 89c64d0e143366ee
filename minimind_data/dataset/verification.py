"""verify(): recompute every checksum of a dataset, which finds a single flipped byte anywhere in it.

Opening a dataset takes no time, and checks the names, sizes and headers of files alone; this reads every byte.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from minimind_data.dataset.format import (
    MANIFEST_NAME,
    REMAKE,
    REMAKE_ALL,
    RESTORE,
    SET_ASIDE_NAME,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
    Manifest,
)
from minimind_data.reporting import Progress, Report, no_progress
from minimind_data.system import num_cores

_BLOCK_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of `verify`."""

    files: int
    """How many files the dataset has."""
    bytes: int
    """How many bytes were read."""
    problems: tuple[str, ...]
    """The files that are wrong, and what is wrong with them; empty for a dataset that is whole."""
    remedies: tuple[str, ...]
    """What to do about the problems, each thing once."""


def verify(folder: Path | str, *, progress: Progress = no_progress) -> Verdict:
    """Compare every file of a dataset with its checksum, several files at a time.

    Args:
        folder: of the dataset.
        progress: shows the bytes that are read.

    Raises:
        FormatError: the manifest, which has the checksums, is missing or damaged.
    """
    folder = Path(folder)
    files = _files(folder, Manifest.read(folder))
    problems: list[str] = []
    remedies: dict[str, None] = {}
    num_bytes = 0
    expected_bytes = sum(file.path.stat().st_size for file in files if file.path.is_file())
    with (
        progress("verify", expected_bytes) as report,
        ThreadPoolExecutor(num_cores()) as pool,  # hashing releases the interpreter's lock
    ):
        for file, (problem, size) in zip(
            files, pool.map(lambda file: _check(file, report), files), strict=True
        ):
            num_bytes += size
            if problem:
                problems.append(problem)
                remedies[file.remedy] = None
    return Verdict(files=len(files), bytes=num_bytes, problems=tuple(problems), remedies=tuple(remedies))


def _check(file: "_File", report: Report) -> tuple[str, int]:
    """Return (what is wrong with a file, or an empty string; the number of bytes that were read)."""
    digest = hashlib.sha256()
    size = 0
    try:
        with file.path.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
                size += len(block)
                report(len(block), 0)
    except FileNotFoundError:
        return f"{file.path}: missing", 0
    except OSError as error:
        return f"{file.path}: cannot be read ({error.strerror})", size
    sha256 = digest.hexdigest()
    if sha256 == file.sha256:
        return "", size
    return f"{file.path}: SHA-256 {sha256[:12]}…, where it should be {file.sha256[:12]}…", size


@dataclass(frozen=True)
class _File:
    """A file of a dataset, the checksum that it should have, and what to do where it has another."""

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
        files.append(_File(folder / f"{entry.name}.bin", entry.written.sha256, REMAKE))
        files.append(_File(folder / f"{entry.name}.idx", entry.written.index_sha256, REMAKE))
        if manifest.has_masks:
            files.append(_File(folder / f"{entry.name}.mask", entry.written.mask_sha256, REMAKE))
    if manifest.tokenizer_config_sha256 is not None:
        files.append(_File(folder / TOKENIZER_CONFIG_NAME, manifest.tokenizer_config_sha256, RESTORE))
    if manifest.set_aside_sha256 is not None:
        files.append(_File(folder / SET_ASIDE_NAME, manifest.set_aside_sha256, REMAKE_ALL))
    return files
