"""What stands already where something is to be written: what belongs to somebody else is never replaced.

A file counts as one of ours by its content or because a manifest names it, never by its name alone. `build.ownership` asks this for the
many files of a dataset; here are the questions about one folder and about one file.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from minimind_data.dataset.format import MANIFEST_NAME
from minimind_data.errors import UserError
from minimind_data.files import parse_json

_RUN_FILES = ("checkpoints", "metrics.jsonl", "run.toml")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.gguf", "*.pth")
_MODEL_KEYS = {"model_type", "architectures", "peft_type"}
_MANIFEST_MARK = b'"format_version"'
_HEAD_BYTES = 2**16


def owner_of(folder: Path) -> str | None:
    """Return what a folder is, where it is that of a training run or of a model; else None."""
    if not folder.is_dir():
        return None
    config = _json_object(folder / "config.json")
    if config is not None and any((folder / name).exists() for name in _RUN_FILES):
        return "a training run"
    has_weights = any(next(folder.glob(pattern), None) is not None for pattern in _WEIGHTS)
    if has_weights or (config or {}).keys() & _MODEL_KEYS or (folder / "adapter_config.json").is_file():
        return "a model"
    return None


def refuse_folder_of_another(folder: Path, option: str) -> None:
    """Refuse a folder that is that of a training run or of a model.

    Args:
        folder: that would be written to.
        option: the parameter that names it.

    Raises:
        UserError: it is.
    """
    if owner := owner_of(folder):
        raise UserError(
            f"the folder of {owner}, whose files would be mixed with these",
            where=folder,
            remedy=f"take another `{option}`, such as a new folder",
            option=option,
        )


def is_manifest(path: Path) -> bool:
    """Tell whether a file is the manifest of a dataset, be it a damaged one, and not a `manifest.json` of another program."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return False
    return _MANIFEST_MARK in head


def refuse_manifest_of_another(folder: Path, option: str) -> None:
    """Refuse a folder whose `manifest.json` is that of another program, or no file; a pipe would be waited for for ever.

    Raises:
        UserError: it is.
    """
    path = folder / MANIFEST_NAME
    if (path.exists() or path.is_symlink()) and not (path.is_file() and is_manifest(path)):
        raise foreign_file(path, option)


def foreign_file(path: Path, option: str) -> UserError:
    """Return the error that a file of somebody else stands where one is to be written."""
    remedy = f"move it away, or take another `{option}`"
    if path.is_symlink() and not path.exists():
        what = "a link that leads nowhere"
        remedy = f"remove the link, or take another `{option}`"
    elif path.is_dir():
        what = "a folder, where a file is to be written"
    else:
        what = "a file of something else, which would be overwritten"
    return UserError(what, where=path, remedy=remedy, option=option)


def refuse_replacing(path: Path, option: str, *, is_ours: Callable[[Path], bool]) -> None:
    """Refuse to write a file where something stands that is not an earlier version of it.

    Args:
        path: of the file.
        option: the parameter that says where it goes.
        is_ours: tells of a file, by its content, whether it may be replaced; an empty one may in any case.

    Raises:
        UserError: a file of another kind stands there, a folder, or a link that leads nowhere.
    """
    if path.is_file():
        if path.stat().st_size and not is_ours(path):
            raise foreign_file(path, option)
    elif path.exists() or path.is_symlink():
        raise foreign_file(path, option)


def has_content(content: bytes) -> Callable[[Path], bool]:
    """Return what tells whether a file holds these very bytes."""
    return lambda path: path.read_bytes() == content


def _json_object(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None where there is none, or something else."""
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
