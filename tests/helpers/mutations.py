"""JSON that somebody has tampered with: every value of a file replaced in turn, and the checksums in it made right again."""

import copy
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minimind_data.files import checksum_of_json

HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 2**31, 2**63, 10**30, 0.5, float("nan"), float("inf"), "", "x", "..", "../../outside", "/etc/passwd", "a/b", "a\nb",
    "\0", "x" * 300, "\ud800", [], [1], {}, {"a": 1}, [[]],
)  # fmt: skip
"""What stands where something else should."""


def mutations(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (what was changed, the changed content): every value at any depth replaced by each hostile one, left out, and joined by another."""
    for path in paths_in(content):
        for value in (*HOSTILE_VALUES, _LEFT_OUT):
            changed = copy.deepcopy(content)
            parent: Any = changed
            for step in path[:-1]:
                parent = parent[step]
            if value is not _LEFT_OUT:
                parent[path[-1]] = value
            else:
                del parent[path[-1]]
            yield (
                f"{'.'.join(map(str, path))} = {'left out' if value is _LEFT_OUT else repr(value)[:40]}",
                changed,
            )
        if isinstance(parent_of(content, path), dict):
            changed = copy.deepcopy(content)
            parent_of(changed, path)["surplus"] = 1
            yield f"{'.'.join(map(str, path))} beside a surplus key", changed


_LEFT_OUT = object()
_HASHED = ("kind", "dtype", "tokenizer", "options", "inputs")


def parent_of(content: Any, path: tuple[Any, ...]) -> Any:
    """The object or list that holds the value at a path."""
    for step in path[:-1]:
        content = content[step]
    return content


def paths_in(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in JSON, at any depth: the keys and indices that lead to it."""
    if path:
        yield path
    members = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    for key, value in members:
        yield from paths_in(value, (*path, key))


def write_with_checksum(path: Path, content: dict[str, Any], key: str) -> None:
    """Write JSON whose checksum under `key` fits its content."""
    path.write_text(json.dumps({**content, key: checksum_of_json(content)}), encoding="utf-8")


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write a manifest with the fingerprint and the checksum that its content has, where it has one."""
    content = dict(content)
    try:
        cut = ("split_bytes", "shard_bytes")
        options = {name: value for name, value in content["options"].items() if name not in cut}
        inputs = [{"bytes": entry["bytes"], "sha256": entry["sha256"]} for entry in content["inputs"]]
        hashed = {name: content[name] for name in _HASHED} | {"options": options, "inputs": inputs}
        content["fingerprint"] = checksum_of_json({"format": content["format_version"], **hashed})
    except (KeyError, TypeError, AttributeError):
        pass
    write_with_checksum(folder / "manifest.json", content, "checksum")


def snapshot(*folders: Path) -> dict[str, str]:
    """The type, size and SHA-256 of everything in some folders, by path."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            status = path.lstat()
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            found[os.fspath(path)] = f"{status.st_mode} {status.st_size if path.is_file() else ''} {content}"
    return found
