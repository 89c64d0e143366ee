"""Whole shards out of a dataset, front to back, held against the manifest's checksums on the way.

What makes new files out of a dataset reads it through here: a damaged byte is never given a checksum that fits it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minimind_data.errors import UserError
from minimind_data.format import SET_ASIDE_NAME, FormatError, TokenArray, numpy_dtype
from minimind_data.framing import BLOCK_TOKENS, document_ranges
from minimind_data.reporting import Report
from minimind_data.shards import ShardSet
from minimind_data.staging import durable_file

Documents = tuple[TokenArray, NDArray[np.int64]]
"""Tokens [sum(lengths)] of the dataset's dtype, and the lengths int64 [documents]."""


def check_kind(shards: ShardSet, doing: str) -> None:
    """Check that every document of a dataset is one sequence and nothing beside its tokens.

    Args:
        shards: the dataset.
        doing: what is to be done to it, as a participle.

    Raises:
        UserError: it is of another kind than pretrain.
    """
    kind = shards.manifest.kind
    if kind != "pretrain":
        raise UserError(f"{shards.folder}: a {kind} dataset; only pretrain ones can be {doing}")


def checked_documents(shards: ShardSet, index: int, report: Report) -> Iterator[Documents]:
    """Read the documents of a shard in blocks, and at the end refuse it where its bytes are not the manifest's.

    Raises:
        FormatError: a checksum does not fit.
    """
    entry, item = shards.manifest.shards[index], shards.dtype.itemsize
    shard = shards.open_shard(index)
    index_sha256 = hashlib.sha256(shard.index.data).hexdigest()
    _check(shards.folder / f"{entry.name}.idx", index_sha256, entry.index_sha256)
    digest = hashlib.sha256()
    path = shards.folder / f"{entry.name}.bin"
    with path.open("rb") as file:
        for first_document in range(0, entry.documents, BLOCK_TOKENS):
            lengths = shard.lengths[first_document : first_document + BLOCK_TOKENS].astype(np.int64)
            for first, last in document_ranges(lengths, BLOCK_TOKENS):
                here = lengths[first:last]
                tokens = np.fromfile(file, numpy_dtype(shards.manifest.dtype), int(here.sum()))
                digest.update(tokens.view(np.uint8).data)
                report(len(tokens) * item, len(tokens))
                yield tokens, here
    _check(path, digest.hexdigest(), entry.sha256)


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
