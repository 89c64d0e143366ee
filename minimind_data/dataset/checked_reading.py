"""Reading whole shards from front to back, and checking them against the checksums of the manifest on the way.

Whatever makes new files out of a dataset reads it through here, so that a damaged byte never gets a new, valid checksum.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.format import SET_ASIDE_NAME, FormatError, MaskArray, TokenArray, numpy_dtype
from minimind_data.dataset.framing import BLOCK_TOKENS, document_ranges
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.dataset.staging import durable_file
from minimind_data.errors import UserError
from minimind_data.reporting import Report

Documents = tuple[TokenArray, NDArray[np.int64]]
"""(tokens [sum(lengths)] of the dataset's dtype, lengths int64 [documents])."""
Sequences = tuple[TokenArray, NDArray[np.int64], MaskArray | None]
"""(tokens [sum(lengths)] of the dataset's dtype, lengths int64 [sequences], loss mask uint8 [sum(lengths)] where there is one)."""


def check_kind(shards: ShardSet, target: str) -> None:
    """Check that the documents of a dataset are single sequences without a loss mask, for a format that has room for nothing else.

    Args:
        shards: the dataset.
        target: the name of the format.

    Raises:
        UserError: the dataset is not of kind pretrain.
    """
    kind = shards.manifest.kind
    if kind != "pretrain":
        raise UserError(
            f"a dataset of kind {kind}, and {target} has no room for its loss mask",
            where=shards.folder,
            remedy="take `target_format` hf or parquet",
            option="target_format",
        )


def checked_documents(shards: ShardSet, index: int, report: Report) -> Iterator[Documents]:
    """Read the documents of a shard, each of which is one sequence, in blocks; see `checked_sequences`."""
    for tokens, lengths, _ in checked_sequences(shards, index, report):
        yield tokens, lengths


def checked_sequences(shards: ShardSet, index: int, report: Report) -> Iterator[Sequences]:
    """Read the sequences of a shard in blocks of whole documents, and check its checksums at the end.

    Raises:
        FormatError: the shard is not the one that the manifest names.
    """
    manifest, entry, item = shards.manifest, shards.manifest.shards[index], shards.dtype.itemsize
    each = manifest.sequences_per_document
    shard = shards.open_shard(index)
    index_sha256 = hashlib.sha256(shard.index.data).hexdigest()
    _check(shards.folder / f"{entry.name}.idx", index_sha256, entry.written.index_sha256)
    shard.refuse_wrong_index(shards.folder)
    digest, mask_digest = hashlib.sha256(), hashlib.sha256()
    paths = [shards.folder / f"{entry.name}{suffix}" for suffix in (".bin", ".mask")]
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(paths[0].open("rb"))
        mask_file = stack.enter_context(paths[1].open("rb")) if manifest.has_masks else None
        for first_document in range(0, entry.written.documents, BLOCK_TOKENS):
            begin = each * first_document
            lengths = shard.lengths[begin : begin + each * BLOCK_TOKENS].astype(np.int64)
            for first, last in document_ranges(lengths.reshape(-1, each).sum(axis=1), BLOCK_TOKENS):
                here = lengths[each * first : each * last]
                tokens = np.fromfile(file, numpy_dtype(manifest.dtype), int(here.sum()))
                digest.update(tokens.view(np.uint8).data)
                mask = None
                if mask_file is not None:
                    mask = np.fromfile(mask_file, np.uint8, len(tokens))
                    mask_digest.update(mask.data)
                report(len(tokens) * item, len(tokens))
                yield tokens, here, mask
    _check(paths[0], digest.hexdigest(), entry.written.sha256)
    if manifest.has_masks:
        _check(paths[1], mask_digest.hexdigest(), entry.written.mask_sha256)


def carry_set_aside(datasets: Sequence[ShardSet], folder: Path) -> str | None:
    """Join the files of bad records of several datasets into one.

    Args:
        datasets: in the order of the result.
        folder: where the file goes; where no dataset has bad records, none is made.

    Returns:
        The SHA-256 of the file, for the manifest; None where there is none.

    Raises:
        FormatError: one of the files is missing, or not the one that its manifest names.
    """
    with_set_aside = [dataset for dataset in datasets if dataset.manifest.set_aside_sha256 is not None]
    if not with_set_aside:
        return None
    whole = hashlib.sha256()
    with durable_file(folder / SET_ASIDE_NAME) as target:
        for dataset in with_set_aside:
            path = dataset.folder / SET_ASIDE_NAME
            if not path.is_file():
                raise FormatError("missing, although the manifest names it", where=path, remedy="put it back")
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(2**20):
                    target.write(block)
                    digest.update(block)
                    whole.update(block)
            _check(path, digest.hexdigest(), str(dataset.manifest.set_aside_sha256))
    return whole.hexdigest()


def _check(path: Path, sha256: str, expected: str) -> None:
    if sha256 != expected:
        raise FormatError(
            f"SHA-256 {sha256[:12]}…, where the manifest says {expected[:12]}…",
            where=path,
            remedy="it is damaged, and `mm-data verify` names all files that are",
        )
