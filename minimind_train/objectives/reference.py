"""The reference's log-probabilities of a dataset of pairs: computed once, kept beside the shards, read through a memory map.

    DATASET/reference/FINGERPRINT-SETTINGS.npy     float32 [pairs, 2]: summed log-probability of chosen and rejected
    DATASET/reference/FINGERPRINT-SETTINGS.json    what they were computed from, and the first file's SHA-256; written last

FINGERPRINT is the dataset's. SETTINGS is a hash of everything else that decides the numbers: the reference's weights, the length of the
windows and the dtype of matrix products. Files that are not whole, or belong to something else, are made again by one process, while
others wait for it. Until it is finished it writes to a third file, with NaN where a number is missing, so that a process that was
killed continues where it stopped.
"""

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.files import (
    FolderLock,
    fsync_folder,
    naming,
    read_checked,
    sha256_of,
    user_error_on_full_disk,
    write_atomic,
    write_checked,
)
from minimind_data.windows.base import Windows, WindowSource
from minimind_train.batches.trimming import batches_of_like_lengths
from minimind_train.model.precision import autocast
from minimind_train.model.transformer import MiniMind
from minimind_train.objectives.preference import REFERENCE, log_probs_of_pairs
from minimind_train.progress import Say

__all__ = ["REFERENCE_FOLDER_NAME", "Reference", "ReferencedWindows", "reference_log_probs"]

REFERENCE_FOLDER_NAME = "reference"
_FORMAT_VERSION = 1
_FILE_NAME = re.compile(r"([0-9a-f]{16})-[0-9a-f]{16}\.(npy|json|unfinished)")
"""The name of any of these files, with the beginning of its dataset's fingerprint."""
_CHECKSUM = "checksum"
_BATCHES_PER_GROUP = 16
"""How many batches are read together, so that pairs of similar length can share a batch."""

LogProbs = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What log-probabilities depend on, besides the dataset."""

    weights: str
    """Checksum of the reference's weights."""
    seq_len: int
    dtype: str
    """Dtype of matrix products, resolved."""


class ReferencedWindows:
    """Windows of pairs with the reference's log-probabilities beside them, a `WindowSource`.

    Args:
        windows: the pairs.
        log_probs: float32 [len(windows), 2].
    """

    def __init__(self, windows: WindowSource, log_probs: LogProbs) -> None:
        assert log_probs.shape == (len(windows), 2)
        self._windows = windows
        self._log_probs = log_probs
        self.labels = windows.labels

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self._windows)

    @property
    def shard_sets(self) -> tuple[ShardSet, ...]:
        """The datasets of the pairs."""
        return self._windows.shard_sets

    def will_need(self, windows: NDArray[np.int64]) -> None:
        """Tell the system that a batch is read soon; the log-probabilities are in memory."""
        self._windows.will_need(windows)

    def fetch(self, windows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return a batch: what the windows give, and `reference_log_probs`, float32 [B, 2]."""
        return {**self._windows.fetch(windows), REFERENCE: self._log_probs[windows]}


def reference_log_probs(
    windows: Windows,
    reference: Reference,
    model: Callable[[], MiniMind],
    *,
    batch: int,
    device: torch.device,
    say: Say,
) -> LogProbs:
    """Return the reference's log-probabilities of all pairs as a memory map, and compute them first where they are missing.

    Args:
        windows: the pairs of one dataset.
        reference: what the numbers depend on.
        model: returns the reference, on the CPU, frozen and in evaluation mode; called only where it is needed.
        batch: pairs that go through it at once.
        device: where to compute.
        say: takes lines for the user.

    Raises:
        UserError: the log-probabilities cannot be written, or are not finite.
    """
    folder = windows.shards.folder / REFERENCE_FOLDER_NAME
    fingerprint = windows.shards.manifest.fingerprint
    settings = {"format_version": _FORMAT_VERSION, "dataset": fingerprint, **asdict(reference)}
    settings_hash = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{fingerprint[:16]}-{settings_hash}.npy"
    content = {**settings, "pairs": len(windows)}
    if (log_probs := _read(path, content)) is not None:
        return log_probs
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot be made ({error.strerror}), so the reference's log-probabilities have no place",
            where=folder,
            remedy="make the dataset's folder writable, or pass `reference` online, which computes them in "
            "every step",
            option="reference",
        ) from None
    waiting = f"{path}: another process computes the reference's log-probabilities; waiting for it"
    with user_error_on_full_disk(folder), FolderLock(path.with_suffix(".lock"), waiting, wait=say):
        if (log_probs := _read(path, content)) is not None:
            return log_probs
        _make(path, windows, model(), batch=batch, device=device, dtype=reference.dtype, say=say)
        content["sha256"] = sha256_of(path)
        _remove_stale(folder, fingerprint)
        write_checked(path.with_suffix(".json"), content, key=_CHECKSUM)
    return _map(path)


def _read(path: Path, content: dict[str, Any]) -> LogProbs | None:
    """Map the log-probabilities, or return None where they are missing, damaged, or belong to something else."""
    try:
        recorded = read_checked(path.with_suffix(".json"), key=_CHECKSUM)
        sha256 = recorded.pop("sha256")
        if recorded != content or sha256_of(path) != sha256:
            return None
        log_probs = _map(path)
        fits = log_probs.shape == (content["pairs"], 2) and log_probs.dtype == np.float32
        return log_probs if fits and np.isfinite(log_probs).all() else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, AttributeError, EOFError):
        return None


def _map(path: Path) -> LogProbs:
    return cast("LogProbs", np.load(path, mmap_mode="r", allow_pickle=False))


def _make(
    path: Path, windows: Windows, model: MiniMind, *, batch: int, device: torch.device, dtype: str, say: Say
) -> None:
    """Compute the pairs that are still missing, block by block, and rename the finished file; the caller holds the lock."""
    unfinished = path.with_suffix(".unfinished")
    log_probs = _open_unfinished(unfinished, len(windows))
    missing = np.isnan(log_probs).any(axis=1)
    num_missing = int(np.count_nonzero(missing))
    say(
        f"{windows.shards.folder}: computing the reference's log-probabilities of {num_missing:,} pairs, once"
        + (f"; {len(windows) - num_missing:,} are there already" if num_missing < len(windows) else "")
    )
    model.to(device)
    # Groups and batches are the same whatever is there already, so the rounding does not show that a process was killed.
    group = batch * _BATCHES_PER_GROUP
    for first in range(0, len(windows), group):
        pairs = np.arange(first, min(first + group, len(windows)))
        if not missing[pairs].any():
            continue
        for rows, samples in batches_of_like_lengths(windows.fetch(pairs), batch):
            if missing[pairs[rows]].any():
                log_probs[pairs[rows]] = _compute(samples, model, device, dtype)
        log_probs.flush()
    if not np.isfinite(log_probs).all():
        unfinished.unlink()
        raise UserError(
            "the reference gives log-probabilities that are not finite",
            where=windows.shards.folder,
            remedy="begin from other weights, or compute them with `dtype` fp32",
            option="dtype",
        )
    with naming(unfinished), unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)
    fsync_folder(path.parent)


def _open_unfinished(unfinished: Path, num_pairs: int) -> "np.memmap[Any, np.dtype[np.float32]]":
    """Map the file that a killed process has left, or a new one full of NaN."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        table = np.lib.format.open_memmap(unfinished, mode="r+")
        if table.shape == (num_pairs, 2) and table.dtype == np.float32:
            return table
    empty = io.BytesIO()
    np.save(empty, np.full((num_pairs, 2), np.nan, np.float32))
    write_atomic(unfinished, empty.getvalue())  # so that no zero is ever in it that was not computed
    return np.lib.format.open_memmap(unfinished, mode="r+")


def _remove_stale(folder: Path, fingerprint: str) -> None:
    """Delete the files of earlier states of the dataset."""
    for path in folder.iterdir():
        match = _FILE_NAME.fullmatch(path.name)
        if match is not None and match[1] != fingerprint[:16]:
            path.unlink(missing_ok=True)


def _compute(
    samples: dict[str, NDArray[np.int64]], model: MiniMind, device: torch.device, dtype: str
) -> LogProbs:
    tensors = {name: torch.from_numpy(array).to(device) for name, array in samples.items()}
    with torch.no_grad(), autocast(dtype, device):
        log_probs, _ = log_probs_of_pairs(model, tensors)
    return log_probs.cpu().numpy()
