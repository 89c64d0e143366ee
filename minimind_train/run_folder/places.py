"""Where the datasets of a run, its validation set and its initial weights are now, when the run or they have moved.

A record holds absolute paths and, beside each, the same path relative to the run folder. So a tree of datasets and runs may be moved or
copied as a whole. Records of earlier versions hold absolute paths alone: where one leads nowhere, its last parts are looked for beside the
folders above the run and above the current one. `/srv/project/data/zh` is found as `data/zh` from `/home/me/project/runs/zh`, say.

A dataset is taken from another place only if its fingerprint is the recorded one. Weights are compared with their checksum when they
are loaded. What the user types is never looked for elsewhere.
"""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from minimind_data.dataset.format import MANIFEST_NAME, FormatError, Manifest
from minimind_data.errors import UserError
from minimind_data.json_fields import read_value
from minimind_train.batches.options import read_sources, source_texts
from minimind_train.progress import Say
from minimind_train.run_folder.record import RESTORE, RUN_CONFIG_NAME, RunRecord

__all__ = ["PLACES", "relative_paths", "validation_fingerprint", "with_present_places"]

PLACES: Mapping[str, Any] = {
    "shards": str | tuple[str, ...],
    "val_shards": str | None,
    "from_weight": str | None,
}
"""The options that say where something is, and what JSON holds there."""


def relative_paths(options: Mapping[str, Any], run: Path) -> dict[str, str]:
    """Return each path in a run's options, as a record holds them, relative to the run folder, by the path itself."""
    paths = [str(source.folder) for source in read_sources(source_texts(options["shards"]))]
    paths += [options[name] for name in ("val_shards", "from_weight") if options[name]]
    return {path: os.path.relpath(path, run.resolve()) for path in paths}


def validation_fingerprint(options: Mapping[str, Any]) -> str | None:
    """Return the fingerprint of the validation set; None where there is none, or no dataset at that place."""
    folder = options["val_shards"]
    manifest = _manifest(Path(folder)) if folder else None
    return manifest.fingerprint if manifest else None


def with_present_places(
    record: RunRecord, run: Path, say: Say, *, names: Collection[str] = PLACES
) -> RunRecord:
    """Return a record whose paths lead to where things are now, as far as they are found.

    Args:
        record: of the run.
        run: its folder.
        say: takes a line for each thing that is elsewhere than recorded.
        names: which of `PLACES` are looked for.

    Raises:
        UserError: the record says something else there than places.
    """
    try:
        for name in PLACES:
            if name in record.options:
                read_value(PLACES[name], record.options[name], name)
        read_sources(source_texts(record.options.get("shards", "")))
    except ValueError as error:
        raise UserError(f"edited or damaged ({error})", where=run / RUN_CONFIG_NAME, remedy=RESTORE) from None
    search = _Search(record, run.resolve(), say)
    finders = {
        "shards": search.shards,
        "val_shards": search.validation_set,
        "from_weight": search.initial_weights,
    }
    options = {
        name: finders[name](record.options[name])
        for name in PLACES
        if name in names and record.options.get(name)
    }
    return replace(record, options=record.options | options)


class _Search:
    """Looks for what a record names, from the folder of its run."""

    def __init__(self, record: RunRecord, run: Path, say: Say) -> None:
        self._record = record
        self._run = run
        self._say = say

    def shards(self, recorded: Any) -> Any:
        """Return the option `shards`, as the record holds it, with the present places of the datasets."""
        sources = read_sources(source_texts(recorded))
        fingerprints = self._record.dataset.split(" ")
        if len(sources) != len(fingerprints):
            return recorded
        texts = []
        for source, name in zip(sources, fingerprints, strict=True):
            fingerprint = name.rpartition("=")[2]
            folder = self._dataset(str(source.folder), fingerprint, "the dataset {} is")
            texts.append(str(replace(source, folder=folder)))
        return texts if isinstance(recorded, list) else texts[0]

    def validation_set(self, recorded: str) -> str:
        """Return the present place of the validation set."""
        return str(self._dataset(recorded, self._record.validation, "the validation set {} is"))

    def initial_weights(self, recorded: str) -> str:
        """Return the present place of the weights that the run began from; they are compared when they are loaded."""
        if Path(recorded).exists():
            return recorded

        def may_be(path: Path) -> bool:
            return path.is_file() or (path / RUN_CONFIG_NAME).is_file()  # a Hugging Face folder has one too

        places = (*self._beside(recorded), *self._by_last_parts(recorded, at_least=2))
        return str(self._first(recorded, places, may_be, "the initial weights {} are"))

    def _dataset(self, recorded: str, fingerprint: str | None, what: str) -> Path:
        """Return the present place of a dataset; one whose fingerprint is not recorded has the run's tokenizer, at least."""

        def is_it(path: Path) -> bool:
            manifest = _manifest(path)
            if manifest is None:
                return False
            if fingerprint is None:
                return manifest.tokenizer == self._record.tokenizer
            return manifest.fingerprint == fingerprint

        there = Path(recorded)
        places = [*self._beside(recorded), there]
        if not (there / MANIFEST_NAME).exists():
            places += self._by_last_parts(recorded, at_least=2 if fingerprint is None else 1)
        return self._first(recorded, places, is_it, what)

    def _first(
        self, recorded: str, places: Collection[Path], fits: Callable[[Path], bool], what: str
    ) -> Path:
        """Return the first place that fits, and say where it is if that is new; the recorded one where none does."""
        place = next((place for place in places if fits(place)), Path(recorded))
        if place != Path(recorded):
            self._say(f"{self._run}: {what.format(f'that the record has at {recorded}')} read from {place}")
        return place

    def _beside(self, recorded: str) -> list[Path]:
        """Return the place that is recorded relative to the run folder, if one is."""
        relative = self._record.relative_paths.get(recorded)
        return [] if relative is None else [Path(os.path.normpath(self._run / relative))]

    def _by_last_parts(self, recorded: str, *, at_least: int) -> list[Path]:
        """Return the places where the last parts of a path lead from the folders above; most parts first, then the nearest folder."""
        parts = Path(recorded).parts[1:]
        here = Path.cwd()
        folders = dict.fromkeys([*self._run.parents, here, *here.parents])
        return [
            folder.joinpath(*parts[first:])
            for first in range(len(parts) + 1 - at_least)
            for folder in folders
        ]


def _manifest(folder: Path) -> Manifest | None:
    try:
        return Manifest.read(folder)
    except (FormatError, UserError, OSError):
        return None
