"""Folders as dataset hubs have them: which of their files are data to train on.

Such a folder has a card (a README.md that begins with YAML) or files like dataset_infos.json beside its data. These are no inputs. Nor
are the files of the splits for testing and validation, unless they are named themselves or by a glob: whoever names the folder means to
train, and a test that was trained on tests nothing. In other folders a name such as test-1.jsonl says nothing.

Source of the names of splits: https://huggingface.co/docs/hub/datasets-file-names-and-splits.
"""

import contextlib
import glob
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from minimind_data.errors import UserError
from minimind_data.inputs import stores

_MARKS = frozenset(("dataset_infos.json", "dataset_info.json", "dataset_dict.json"))
_CARD = "README.md"
_CARD_START = b"---"
_METADATA = _MARKS | {"state.json"}
_METADATA_STEMS = frozenset(("readme", "license", "licence", "notice", "citation"))
_TRAINING = frozenset(("train", "training"))
_SPLITS = {
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
_WORD = re.compile(r"[a-z]+")
_FOLDERS_ABOVE = 2  # as for REPOSITORY/data/CONFIGURATION


@dataclass(frozen=True, kw_only=True)
class HeldOutFile:
    """A file of a split that is not for training."""

    location: str
    split: str
    """`test` or `validation`."""
    pattern: str
    """A glob that takes it and the others of its split beside it."""


@dataclass(frozen=True, kw_only=True)
class HubFolder:
    """The files of a folder as dataset hubs have them."""

    data: list[str]
    """Those to train on, as far as their names say, in order."""
    metadata: list[str]
    held_out: list[HeldOutFile]


def hub_folder(folder: str, files: Sequence[str], head_of: Callable[[str], bytes]) -> HubFolder | None:
    """Sort the files of a folder, if it or a folder in it is one as dataset hubs have them; else return None.

    Args:
        folder: a path or a URI, as a user named it.
        files: paths or URIs of the files in it and in its folders.
        head_of: returns the first bytes of a file.
    """
    is_remote = stores.is_uri(folder)
    names = [stores.shown(file) if is_remote else file for file in files]
    roots = {
        PurePosixPath(name).parent
        for file, name in zip(files, names, strict=True)
        if _is_mark(PurePosixPath(name).name, lambda file=file: head_of(file))  # type: ignore[misc]
    }
    top = PurePosixPath(stores.shown(folder) if is_remote else folder)
    if not is_remote and _is_below_a_mark(Path(folder), head_of):
        roots.add(top)
    if not roots:
        return None
    result = HubFolder(data=[], metadata=[], held_out=[])
    for file, name in zip(files, names, strict=True):
        path = PurePosixPath(name)
        if roots.isdisjoint(path.parents):
            result.data.append(file)
        elif path.name in _METADATA or path.name.partition(".")[0].lower() in _METADATA_STEMS:
            result.metadata.append(file)
        elif (place := _split_of(path.relative_to(top))) is not None:
            split, pattern = place
            start = str(top) if is_remote else glob.escape(str(top))
            result.held_out.append(HeldOutFile(location=file, split=split, pattern=f"{start}/{pattern}"))
        else:
            result.data.append(file)
    return result


def _is_mark(name: str, head: Callable[[], bytes]) -> bool:
    if name != _CARD:
        return name in _MARKS
    with contextlib.suppress(UserError, OSError):
        return head().startswith(_CARD_START)
    return False


def _is_below_a_mark(folder: Path, head_of: Callable[[str], bytes]) -> bool:
    """Tell whether one of the folders above a folder is one as hubs have them, and so the folder is a part of it."""
    above = list(folder.absolute().parents)[:_FOLDERS_ABOVE]
    marks = [parent / name for parent in above for name in (*_MARKS, _CARD)]
    return any(mark.is_file() and _is_mark(mark.name, lambda: head_of(str(mark))) for mark in marks)  # noqa: B023 - called at once


def _split_of(path: PurePosixPath) -> tuple[str, str] | None:
    """Return (the split, a glob for it) that a path in such a folder belongs to, if it is not for training.

    The name of the file says it or, where that names no split, the folder nearest to it that does.
    """
    for depth in range(len(path.parts), 0, -1):
        name = path.parts[depth - 1]
        words = list(_WORD.finditer(name.lower()))
        if any(word[0] in _TRAINING for word in words):
            return None
        word = next((word for word in words if word[0] in _SPLITS), None)
        if word is None:
            continue
        before = [glob.escape(part) for part in path.parts[: depth - 1]]
        if depth < len(path.parts):
            return _SPLITS[word[0]], "/".join((*before, glob.escape(name), "**", f"*{path.suffix}"))
        mark = name[word.end() : word.end() + 1]
        start = name[: word.end()] + ("" if mark.isalnum() else mark)
        return _SPLITS[word[0]], "/".join((*before, f"{glob.escape(start)}*"))
    return None
