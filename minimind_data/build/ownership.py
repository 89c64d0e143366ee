"""Whose files are in the folder of a build: it begins only where it will replace and remove nothing but a dataset's own.

A file is the dataset's own where its manifest names it, or the plan of an unfinished build does: a plan is written after this check, so
what stands under its names was made by that build. Where a user has deleted the manifest to have everything made anew, a shard beside the
very tokenizer.json that the build would write counts as its own.

Nothing is written here, so a folder that is refused stays as it was.
"""

import contextlib
import glob
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minimind_data.build.work_folder import WorkFolder, shard_suffixes
from minimind_data.dataset.format import (
    INDEX_MAGIC,
    MANIFEST_NAME,
    SET_ASIDE_NAME,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
    VALIDATION_NAME,
    Kind,
    Manifest,
)
from minimind_data.dataset.occupancy import foreign_file, refuse_folder_of_another, refuse_manifest_of_another
from minimind_data.errors import UserError
from minimind_data.files import parse_json
from minimind_data.inputs import stores
from minimind_data.inputs.sources import STDIN

_METADATA_NAMES = (MANIFEST_NAME, TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, SET_ASIDE_NAME)
_ANOTHER = "take another `out`, such as a new folder"


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """The files that a build writes."""

    shards: Collection[str]
    """Names of the shards, without suffixes."""
    kind: Kind
    tokenizer: Mapping[str, str]
    """The content of the files of the tokenizer, by their names."""
    has_validation: bool
    """Whether shards may also go to the folder of the validation part."""


def refuse_unusable_folder(work: WorkFolder, inputs: Sequence[str]) -> None:
    """Refuse a folder that no dataset can be in, whatever its shards are called.

    Args:
        work: the folder of the build.
        inputs: as the user names them.

    Raises:
        UserError: it is no folder, that of a run or of a model, one with the manifest of another program, or in a folder that is an input.
    """
    out = work.out
    if out.is_symlink() and not out.exists():
        raise UserError(
            "a link that leads nowhere",
            where=out,
            remedy="make the folder that it leads to, or remove the link",
            option="out",
        )
    if out.exists() and not out.is_dir():
        raise UserError("cannot be written (a file, not a folder)", where=out, remedy=_ANOTHER, option="out")
    _refuse_input_folders(out, inputs)
    refuse_manifest_of_another(out, "out")
    if work.plan() is None and not _has_manifest(work):
        refuse_folder_of_another(out, "out")


def _refuse_input_folders(out: Path, inputs: Sequence[str]) -> None:
    """Refuse a folder that an input would include from the second run on, so that the dataset would be read as text."""
    target = Path(os.path.realpath(out))
    for name in inputs:
        if name == STDIN or stores.is_uri(name):
            continue
        folder = Path(os.path.realpath(name))
        if folder.is_dir() and target.is_relative_to(folder):
            inner = target.relative_to(folder).parts
            if not any(part.startswith(".") for part in inner):  # an input folder is read without these
                raise UserError(
                    f"{'in' if inner else 'is'} the input folder {name}, so the next run would read the dataset as text",
                    where=out,
                    remedy="take another `out`, or name the input files",
                    option="out",
                )
        elif glob.has_magic(name) and not folder.exists():
            for match in glob.iglob(name, recursive=True):  # noqa: PTH207 - from cwd or root
                path = Path(os.path.realpath(match))
                if path.name in _METADATA_NAMES and path.parent in (target, target / VALIDATION_NAME):
                    raise UserError(
                        f"{path.name} there would be read as text, for {name} matches it",
                        where=out,
                        remedy="take another `out`, or a pattern for the text files alone",
                        option="out",
                    )


def refuse_foreign_files(work: WorkFolder, outputs: Outputs, inputs: Sequence[str]) -> None:
    """Refuse a folder in which a build would replace or remove what belongs to somebody else.

    Args:
        work: the folder of the build.
        outputs: what the build writes.
        inputs: the places of its input files.

    Raises:
        UserError: there is such a file, or an input file is one that the build would write.
    """
    # First what is there, then whose it is. A build that runs beside this one, for another slice, writes its plan before its files, and
    # its manifest before it removes the plan.
    there = {folder: _names_in(folder) for folder in (work.out, work.val)}
    claims = _Claims(work, outputs)
    has_validation = outputs.has_validation or claims.has_validation
    if has_validation and VALIDATION_NAME in there[work.out] and not work.val.is_dir():
        raise UserError(
            "a link that leads nowhere" if work.val.is_symlink() else "a file, where a folder is needed",
            where=work.val,
            remedy="move it away, or take another `out`",
            option="out",
        )
    if work.path.name in there[work.out] and not work.path.is_dir():
        raise foreign_file(work.path, "out")
    input_files = {os.path.realpath(path) for path in inputs if not stores.is_uri(path)}
    for path in _places(work, outputs, claims, has_validation=has_validation):
        if path.name not in there[path.parent]:
            continue
        if path.is_file() and os.path.realpath(path) in input_files:
            raise UserError(
                "an input, and the build would overwrite it",
                where=path,
                remedy="take another `out`, or name the inputs one by one",
                option="out",
            )
        if path not in claims or (path.is_symlink() and not path.exists()) or path.is_dir():
            raise foreign_file(path, "out")


def _names_in(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))  # noqa: PTH208 - the names alone, of maybe a hundred thousand files
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise UserError(
            f"cannot be listed ({error.strerror})",
            where=folder,
            remedy="make it readable, or take another `out`",
            option="out",
        ) from None


def _places(work: WorkFolder, outputs: Outputs, claims: "_Claims", *, has_validation: bool) -> Iterator[Path]:
    """Yield the path of each file that the build may write or remove."""
    shards = sorted({*outputs.shards, *claims.shards})
    for folder in (work.out, work.val) if has_validation else (work.out,):
        yield folder / MANIFEST_NAME
        for name in outputs.tokenizer:
            yield folder / name
        for name in shards:
            for suffix in shard_suffixes(outputs.kind):
                yield folder / f"{name}{suffix}"
    yield work.out / SET_ASIDE_NAME


class _Claims:
    """The files that are a dataset's own: `path in claims`.

    Args:
        work: the folder of the build.
        outputs: what the build writes.
    """

    def __init__(self, work: WorkFolder, outputs: Outputs) -> None:
        self._outputs = outputs
        self._out, self._val = work.out, work.val
        self._shards: dict[Path, set[str]] = {work.out: set(), work.val: set()}
        self._paths: set[Path] = set()
        plan = work.plan()
        if plan is not None:
            for folder in (work.out, work.val) if plan.has_validation else (work.out,):
                self._claim(folder, plan.shards, _METADATA_NAMES)
        manifest = self._claim_by_manifest(work.out, work.previous)
        self.has_validation = (plan is not None and plan.has_validation) or (
            manifest is not None and bool(manifest.options.get("val_fraction"))
        )
        if self.has_validation:
            self._claim_by_manifest(work.val, work.previous / VALIDATION_NAME)
        elif manifest is None and plan is None and (work.val / MANIFEST_NAME).is_file():
            with contextlib.suppress(UserError):
                if Manifest.read(work.val).options.get("part") == "validation":
                    self._claim_by_manifest(work.val)
        self._is_deleted = manifest is None and plan is None and self._is_same(work.out / TOKENIZER_NAME)

    @property
    def shards(self) -> set[str]:
        """The names of the shards that are claimed anywhere."""
        return self._shards[self._out] | self._shards[self._val]

    def __contains__(self, path: Path) -> bool:
        """Tell whether the file at a path is the dataset's own, or already what the build would write there."""
        is_shard = path.suffix in shard_suffixes(self._outputs.kind)
        if is_shard and path.stem in self._shards[path.parent]:
            return True
        if path in self._paths or self._is_same(path):
            return True
        if not self._is_deleted:
            return False
        if path.name == SET_ASIDE_NAME:
            return _holds_bad_records(path)
        return is_shard and _begins_with(path.with_name(f"{path.stem}.idx"), INDEX_MAGIC)

    def _claim(self, folder: Path, shards: Collection[str], names: Sequence[str]) -> None:
        self._shards[folder].update(shards)
        self._paths.update(folder / name for name in names)

    def _claim_by_manifest(self, folder: Path, *elsewhere: Path) -> Manifest | None:
        """Claim what the manifest of a folder names, wherever the manifest is now."""
        place = next((one for one in (folder, *elsewhere) if (one / MANIFEST_NAME).is_file()), None)
        if place is None:
            return None
        manifest = Manifest.read(place)
        names = [MANIFEST_NAME, TOKENIZER_NAME]
        names += [] if manifest.tokenizer_config_sha256 is None else [TOKENIZER_CONFIG_NAME]
        names += [SET_ASIDE_NAME] if manifest.set_aside else []
        self._claim(folder, [entry.name for entry in manifest.shards], names)
        return manifest

    def _is_same(self, path: Path) -> bool:
        """Tell whether a file holds what the build would write there."""
        content = self._outputs.tokenizer.get(path.name)
        return content is not None and path.is_file() and path.read_bytes() == content.encode()


def _has_manifest(work: WorkFolder) -> bool:
    return any((folder / MANIFEST_NAME).is_file() for folder in (work.out, work.previous))


def _begins_with(path: Path, magic: bytes) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _holds_bad_records(path: Path) -> bool:
    """Tell whether a file is one of bad records, by its first line."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        line = file.readline()
    try:
        record = parse_json(line)
    except ValueError:
        return False
    return isinstance(record, dict) and {"path", "line"} <= record.keys()
