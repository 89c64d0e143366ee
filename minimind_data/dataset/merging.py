"""merge(): several datasets of one tokenizer become one dataset, whose shards are the same files.

The shards are hard-linked, or copied where that is impossible, and not read: their checksums are those in the manifests, and only their
sizes are checked. The documents come in the order in which the datasets are named, and so do the inputs.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from minimind_data.dataset.checked_reading import carry_set_aside
from minimind_data.dataset.format import REMAKE, FormatError, Manifest, ShardEntry, TokenizerInfo
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.dataset.staging import new_folder, place_file, unique_names, write_metadata
from minimind_data.errors import UserError
from minimind_data.options import as_paths
from minimind_data.reporting import Progress, no_progress


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """How datasets become one."""

    out: Annotated[Path, "Folder to write, new or empty."]
    copy: Annotated[bool, "Copy the shards; by default they are hard-linked where possible."] = False

    def __post_init__(self) -> None:
        as_paths(self, "out")


def merge(
    folders: Sequence[Path | str],
    options: MergeOptions,
    *,
    progress: Progress = no_progress,
) -> Manifest:
    """Make one dataset of several, one after the other; a dataset that is named twice is in it twice.

    Args:
        folders: the datasets, in the order of the result.
        options: the folder of the result, and whether to link or copy.
        progress: shows the bytes and the tokens of the shards that are in place.

    Returns:
        The manifest of the result.

    Raises:
        UserError: the datasets are of different kinds or tokenizers, or `out` cannot be written to.
        FormatError: one of them is damaged.
    """
    if len(folders) < 2:
        raise UserError("a merge takes at least two datasets", remedy="name them one after the other")
    datasets = [ShardSet.open(folder) for folder in folders]
    for dataset in datasets:
        _refuse_different(datasets[0], dataset)
        for entry in dataset.manifest.shards:
            _check_sizes(dataset.folder, entry)
    manifest = _joined_manifest([dataset.manifest for dataset in datasets])
    with new_folder(options.out) as folder:
        with progress("merge", manifest.num_bytes) as report:
            old = ((dataset.folder, entry) for dataset in datasets for entry in dataset.manifest.shards)
            for (source, entry), new in zip(old, manifest.shards, strict=True):
                for suffix in entry.written.file_sizes():
                    place_file(
                        source / f"{entry.name}{suffix}", folder / f"{new.name}{suffix}", copy=options.copy
                    )
                report(entry.written.bytes, entry.written.tokens)
        manifest = dataclasses.replace(manifest, set_aside_sha256=carry_set_aside(datasets, folder))
        write_metadata(folder, manifest, datasets[0].folder)
    return manifest


def _refuse_different(first: ShardSet, other: ShardSet) -> None:
    there, here = (
        {
            "kind": dataset.manifest.kind,
            "dtype": dataset.manifest.dtype,
            "tokenizer": dataset.manifest.tokenizer,
            "chat template": dataset.manifest.tokenizer_config_sha256 if dataset.manifest.has_masks else None,
        }
        for dataset in (first, other)
    )
    different = [
        f"{name} is {_in_words(there[name])} there and {_in_words(here[name])} here"
        for name in there
        if there[name] != here[name]
    ]
    if different:
        raise UserError(
            f"cannot be merged with {first.folder}: {'; '.join(different)}",
            where=other.folder,
            remedy="merge datasets of one kind that were made with one tokenizer",
        )


def _in_words(value: object) -> str:
    """Return what a manifest says for people, checksums by their first digits."""
    if isinstance(value, TokenizerInfo):
        return f"one of {value.vocab_size:,} entries, {value.special_ids_in_words} ({value.sha256[:12]}…)"
    text = "none" if value is None else str(value)
    return text if len(text) <= _FEW_DIGITS else f"{text[:_FEW_DIGITS]}…"


_FEW_DIGITS = 12


def _check_sizes(folder: Path, entry: ShardEntry) -> None:
    for suffix, size in entry.written.file_sizes().items():
        path = folder / f"{entry.name}{suffix}"
        if not path.is_file():
            raise FormatError("missing", where=path, remedy=REMAKE)
        if (size_here := path.stat().st_size) != size:
            what = f"{size_here:,} bytes, where the manifest says {size:,}"
            raise FormatError(what, where=path, remedy=REMAKE)


def _joined_manifest(manifests: Sequence[Manifest]) -> Manifest:
    """Return the manifest of the result, which follows from the manifests alone, whatever folders they are in."""
    inputs = tuple(entry for manifest in manifests for entry in manifest.inputs)
    shards: list[ShardEntry] = []
    inputs_before = 0
    for manifest in manifests:
        shards += [entry.moved_by(inputs_before) for entry in manifest.shards]
        inputs_before += len(manifest.inputs)
    names = unique_names([entry.name for entry in shards])
    return Manifest(
        kind=manifests[0].kind,
        dtype=manifests[0].dtype,
        tokenizer=manifests[0].tokenizer,
        options={"merged_from": [manifest.fingerprint for manifest in manifests]},
        inputs=inputs,
        shards=tuple(
            dataclasses.replace(entry, name=name) for entry, name in zip(shards, names, strict=True)
        ),
        empty_texts=sum(manifest.empty_texts for manifest in manifests),
        set_aside=sum(manifest.set_aside for manifest in manifests),
        duplicates=sum(manifest.duplicates for manifest in manifests),
        tokenizer_config_sha256=manifests[0].tokenizer_config_sha256,
    )
