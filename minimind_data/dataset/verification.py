"""verify(): recompute every checksum of a dataset, which finds a single flipped byte anywhere in it.

Opening a dataset takes no time, and checks the names, sizes and headers of files alone; this reads every byte.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minimind_data.dataset.format import (
    MANIFEST_NAME,
    REMAKE,
    REMAKE_ALL,
    RESTORE,
    SET_ASIDE_NAME,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
    VALIDATION_NAME,
    FormatError,
    Manifest,
    ShardEntry,
    TokenDtype,
    numpy_dtype,
)
from minimind_data.dataset.plan_file import PlanFile, plans_of
from minimind_data.dataset.shard import Shard
from minimind_data.files import is_out_of_files
from minimind_data.reporting import Progress, Report, no_progress
from minimind_data.system import num_cores

_BLOCK_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of `verify`."""

    files: int
    """How many files the dataset has, its validation part and its packing plans included."""
    bytes: int
    """How many bytes were read."""
    problems: tuple[str, ...]
    """The files that are wrong, and what is wrong with them; empty for a dataset that is whole."""
    remedies: tuple[str, ...]
    """What to do about the problems, each thing once."""
    folders: tuple[str, ...]
    """The datasets that were read: the folder, and that of its validation part where it has one."""
    plans: int
    """How many packing plans were read."""


def verify(folder: Path | str, *, progress: Progress = no_progress) -> Verdict:
    """Compare every file of a dataset with its checksum, several files at a time.

    Its validation part is read too, and so are the packing plans in both folders. Every token is compared with the vocabulary.

    Args:
        folder: of the dataset.
        progress: shows the bytes that are read.

    Raises:
        FormatError: the manifest, which has the checksums, is missing or damaged.
    """
    folder = Path(folder)
    manifests = {folder: Manifest.read(folder)}
    problems: list[str] = []
    remedies: dict[str, None] = {}
    validation = folder / VALIDATION_NAME
    if (validation / MANIFEST_NAME).exists():
        try:
            manifests[validation] = Manifest.read(validation)
        except FormatError as error:
            problems.append(f"{error.where}: {error.what}")
            remedies[error.remedy or REMAKE_ALL] = None
    files = [file for place, manifest in manifests.items() for file in _files(place, manifest)]
    num_bytes = 0
    expected_bytes = sum(file.path.stat().st_size for file in files if file.path.is_file())
    with (
        progress("verify", expected_bytes) as report,
        ThreadPoolExecutor(num_cores()) as pool,  # hashing releases the interpreter's lock
    ):
        for file, (problem, size) in zip(
            files, pool.map(lambda file: file.check(report), files), strict=True
        ):
            num_bytes += size
            if problem:
                problems.append(f"{file.path}: {problem}")
                remedies[file.remedy] = None
    return Verdict(
        files=len(files),
        bytes=num_bytes,
        problems=tuple(problems),
        remedies=tuple(remedies),
        folders=tuple(map(str, manifests)),
        plans=sum(isinstance(file, _Plan) for file in files),
    )


@dataclass(frozen=True)
class _File:
    """A file of a dataset, the checksum that it should have, and what to do where it has another."""

    path: Path
    sha256: str
    remedy: str
    tokens: tuple[np.dtype[Any], int] | None = None
    """Of a file of tokens: their dtype, and the size of their vocabulary."""
    content_problem: Callable[[], str] = lambda: ""
    """Returns a clause on what the content contradicts, or an empty string; called where the checksum fits."""

    def check(self, report: Report) -> tuple[str, int]:
        """Return (what is wrong, or an empty string; the number of bytes that were read)."""
        digest = hashlib.sha256()
        size = 0
        foreign = ""
        try:
            with self.path.open("rb") as stream:
                while block := stream.read(_BLOCK_BYTES):
                    digest.update(block)
                    foreign = foreign or self._foreign_token(block, size)
                    size += len(block)
                    report(len(block), 0)
        except FileNotFoundError:
            return "missing", 0
        except OSError as error:
            if is_out_of_files(error):
                raise
            return f"cannot be read ({error.strerror})", size
        sha256 = digest.hexdigest()
        if sha256 == self.sha256:
            return foreign or self.content_problem(), size
        return f"SHA-256 {sha256[:12]}…, where it should be {self.sha256[:12]}…", size

    def _foreign_token(self, block: bytes, start: int) -> str:
        """Return a clause on a token outside of the vocabulary, or an empty string; the block begins at a byte of the file."""
        if self.tokens is None:
            return ""
        dtype, vocab_size = self.tokens
        tokens = np.frombuffer(block, dtype, len(block) // dtype.itemsize)
        outside = np.flatnonzero((tokens >= vocab_size) | (tokens < 0))
        if not len(outside):
            return ""
        first = int(outside[0])
        return (
            f"token {tokens[first]} at offset {start // dtype.itemsize + first} is outside of the vocabulary of {vocab_size:,} "
            "entries, although the checksum fits"
        )


@dataclass(frozen=True)
class _Plan:
    """A packing plan, which has its checksum in itself."""

    path: Path
    manifest: Manifest

    @property
    def remedy(self) -> str:
        """What to do where it is damaged."""
        return "delete the packing plan: it is made again when it is needed"

    def check(self, report: Report) -> tuple[str, int]:
        """Return (what is wrong, or an empty string; the number of bytes that were read)."""
        try:
            size = self.path.stat().st_size
            plan = PlanFile.read(self.path, self.manifest)
            problem = "no packing plan of this dataset" if plan is None else plan.problem()
        except OSError as error:
            if is_out_of_files(error):
                raise
            return f"cannot be read ({error.strerror})", 0
        report(size, 0)
        return problem or "", size


def _index_problem(folder: Path, entry: ShardEntry, dtype: TokenDtype) -> str:
    try:
        return Shard(folder, entry, dtype).index_problem()
    except FormatError as error:
        # Where that is another file of the shard, it is named by itself.
        return error.what if str(error.where).endswith(".idx") else ""


def _files(folder: Path, manifest: Manifest) -> list[_File | _Plan]:
    manifest_sha256 = hashlib.sha256(manifest.to_json().encode()).hexdigest()
    tokens = numpy_dtype(manifest.dtype), manifest.tokenizer.vocab_size
    files: list[_File | _Plan] = [
        _File(folder / MANIFEST_NAME, manifest_sha256, RESTORE),
        _File(folder / TOKENIZER_NAME, manifest.tokenizer.sha256, RESTORE),
    ]
    for entry in manifest.shards:
        files.append(_File(folder / f"{entry.name}.bin", entry.written.sha256, REMAKE, tokens))
        problem = partial(_index_problem, folder, entry, manifest.dtype)
        index = _File(folder / f"{entry.name}.idx", entry.written.index_sha256, REMAKE, None, problem)
        files.append(index)
        if manifest.has_masks:
            files.append(_File(folder / f"{entry.name}.mask", entry.written.mask_sha256, REMAKE))
    if manifest.tokenizer_config_sha256 is not None:
        files.append(_File(folder / TOKENIZER_CONFIG_NAME, manifest.tokenizer_config_sha256, RESTORE))
    if manifest.set_aside_sha256 is not None:
        files.append(_File(folder / SET_ASIDE_NAME, manifest.set_aside_sha256, REMAKE_ALL))
    files += [_Plan(path, manifest) for path in plans_of(folder, manifest)]
    return files
