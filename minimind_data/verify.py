"""verify(): recompute every checksum of a dataset, so that a single flipped byte anywhere in it is found.

Opening a dataset checks names, sizes and headers and costs nothing; this reads every byte.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minimind_data.files import sha256_of
from minimind_data.format import MANIFEST_NAME, REMAKE, TOKENIZER_NAME, Manifest


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What `verify` found."""

    files: int
    """Files that were read."""
    bytes: int
    problems: tuple[str, ...]
    """One sentence each: which file, what is wrong, what to do. Empty for a whole dataset."""


def dataset_bytes(folder: Path) -> int:
    """Return how many bytes `verify` will read."""
    return sum(path.stat().st_size for path, _ in _files(folder, Manifest.read(folder)) if path.is_file())


def verify(folder: Path, report: Callable[[int], None] = lambda _: None) -> Verdict:
    """Hold every file of a dataset against its checksum.

    Args:
        folder: the dataset.
        report: told the bytes of each file as it is done.

    Raises:
        FormatError: there is no readable manifest to hold anything against.
    """
    manifest = Manifest.read(folder)
    path = folder / MANIFEST_NAME
    problems = (
        [] if path.read_text() == manifest.to_json() else [f"{path}: was edited by hand or damaged; {REMAKE}"]
    )
    num_bytes = 0
    files = _files(folder, manifest)
    for path, wanted in files:
        try:
            found = sha256_of(path)
            size = path.stat().st_size
        except FileNotFoundError:
            problems.append(f"{path}: missing; {REMAKE}")
            continue
        num_bytes += size
        report(size)
        if found != wanted:
            problems.append(
                f"{path}: SHA-256 {found[:12]}…, where the manifest wants {wanted[:12]}…; {REMAKE}"
            )
    return Verdict(files=len(files) + 1, bytes=num_bytes, problems=tuple(problems))


def _files(folder: Path, manifest: Manifest) -> list[tuple[Path, str]]:
    files = [(folder / TOKENIZER_NAME, manifest.tokenizer.sha256)]
    for entry in manifest.shards:
        files += [
            (folder / f"{entry.name}.bin", entry.sha256),
            (folder / f"{entry.name}.idx", entry.index_sha256),
        ]
    return files
