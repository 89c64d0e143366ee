"""Whole shards out of a dataset, front to back, held against the manifest's checksums on the way.

What makes new files out of a dataset reads it through here: a damaged byte is never given a checksum that fits it.
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
"""Tokens [sum(lengths)] of the dataset's dtype, and the lengths int64 [documents]."""
Sequences = tuple[TokenArray, NDArray[np.int64], MaskArray | None]
"""Likewise, of sequences; with what is learned of the tokens, uint8 [sum(lengths)], where the dataset says."""


def check_kind(shards: ShardSet, target: str) -> None:
    """Check that every document of a dataset is one sequence and nothing beside its tokens, as a format wants it.

    Args:
        shards: the dataset.
        target: the format.

    Raises:
        UserError: it is of another kind than pretrain.
    """
    kind = shards.manifest.kind
    if kind != "pretrain":
        raise UserError(
            f"a dataset of kind {kind}, and {target} has no place for what of it is learned",
            where=shards.folder,
            remedy="take `target_format` hf or parquet",
            option="target_format",
        )


def checked_documents(shards: ShardSet, index: int, report: Report) -> Iterator[Documents]:
    """Read the documents of a shard in blocks, each one sequence; else as `checked_sequences`."""
    for tokens, lengths, _ in checked_sequences(shards, index, report):
        yield tokens, lengths


def checked_sequences(shards: ShardSet, index: int, report: Report) -> Iterator[Sequences]:
    """Read the sequences of a shard in blocks of whole documents, and at the end refuse it where its bytes are not the manifest's.

    Raises:
        FormatError: a checksum does not fit.
    """
    manifest, entry, item = shards.manifest, shards.manifest.shards[index], shards.dtype.itemsize
    each = manifest.sequences_per_document
    shard = shards.open_shard(index)
    index_sha256 = hashlib.sha256(shard.index.data).hexdigest()
    _check(shards.folder / f"{entry.name}.idx", index_sha256, entry.written.index_sha256)
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
    """Join the files of bad records that datasets were made without, so that what was left out stays known.

    Args:
        datasets: where they are, in order.
        folder: where the one file goes; none is made where there are none.

    Returns:
        Its SHA-256, which the manifest wants, or None.

    Raises:
        FormatError: one is missing or not what its manifest says.
    """
    with_set_aside = [dataset for dataset in datasets if dataset.manifest.set_aside_sha256 is not None]
    if not with_set_aside:
        return None
    whole = hashlib.sha256()
    with durable_file(folder / SET_ASIDE_NAME) as target:
        for dataset in with_set_aside:
            path = dataset.folder / SET_ASIDE_NAME
            if not path.is_file():
                raise FormatError(f"{path}: missing, though the manifest names it; put it back")
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(2**20):
                    target.write(block)
                    digest.update(block)
                    whole.update(block)
            _check(path, digest.hexdigest(), str(dataset.manifest.set_aside_sha256))
    return whole.hexdigest()


def _check(path: Path, found: str, wanted: str) -> None:
    if found != wanted:
        raise FormatError(
            f"{path}: SHA-256 {found[:12]}…, where the manifest wants {wanted[:12]}…; it is damaged, and `mm-data verify` "
            "finds everything that is"
        )
