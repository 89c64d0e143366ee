"""Small changes of the files that untrusted folders consist of, drawn at random, and checksums that fit them again."""

import copy
import hashlib
import json
import random
import struct
import zlib
from pathlib import Path
from typing import Any

from minimind_data.dataset.plan_file import HEADER_BYTES
from minimind_data.files import checksum_of_json
from tests.helpers.mutations import HOSTILE_VALUES, parent_of, paths_in, write_manifest, write_with_checksum

_MORE_VALUES: tuple[Any, ...] = (
    2**16, 2**20, 2**31 - 1, 2**40, 2**53 - 1, 10**400, -(2**63), 1e-320, 1e308, -1.5, "1", "\u202e", "[" * 5000, "%s%n{0}",
    "../outside/victim", "outside", ".", "data", "a" * 100_000, {"a": {"a": {"a": []}}}, [0] * 1000, ["x", 1, None],
)  # fmt: skip
_PIECES = (
    "{{ 'a' * 10**9 }}", "{% for i in range(10**9) %}{{ i }}{% endfor %}", "{{ messages[0].__class__ }}", "{{ x.y.z }}", "{% if %}",
    "{{ lipsum(n=10**6) }}", "{{ [messages] * 10**8 }}", "{{ messages | map('upper') | join }}", "{{ '<|im_end|>' }}", "\0", "[" * 3000,
    "{% set x = messages %}{% for a in x %}{% for b in x %}{{ b }}{% endfor %}{% endfor %}", '"', "\n", "\\", "'''", "= [[[", "1e999",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "\udcff",
)  # fmt: skip


def changed_value(value: Any, source: random.Random) -> Any:
    """A value near this one, or a hostile one."""
    if isinstance(value, int) and source.random() < 0.5:
        return source.choice(
            [value + 1, value - 1, -value, 2 * value, value * 2**16, float(value), str(value), [value]]
        )
    if isinstance(value, str) and source.random() < 0.3:
        return changed_text(value, source)
    if isinstance(value, list) and value and source.random() < 0.6:
        return source.choice([value[:-1], value + value, value[::-1], value * 50])
    return source.choice((*HOSTILE_VALUES, *_MORE_VALUES))


def changed_json(content: Any, source: random.Random) -> Any:
    """JSON of which one to three values are others, left out, joined by more, or in another place."""
    content = copy.deepcopy(content)
    for _ in range(source.choice((1, 1, 1, 2, 3))):
        paths = list(paths_in(content))
        if not paths:
            return source.choice(HOSTILE_VALUES)
        path = source.choice(paths)
        parent = parent_of(content, path)
        deed = source.random()
        if deed < 0.7:
            parent[path[-1]] = changed_value(parent[path[-1]], source)
        elif deed < 0.85:
            del parent[path[-1]]
        elif isinstance(parent, dict):
            parent[source.choice(["surplus", "__class__", "", "auto_map", "type"])] = parent[path[-1]]
        else:
            parent.insert(0, source.choice(HOSTILE_VALUES))
    return content


def changed_text(text: str, source: random.Random) -> str:
    """A text with a hostile piece in it, or without a part of it, or with that twice."""
    place = source.randrange(len(text) + 1)
    stop = min(len(text), place + source.randrange(1, 40))
    return source.choice(
        [
            text[:place] + source.choice(_PIECES) + text[place:],
            text[:place] + text[stop:],
            text[:stop] + text[place:stop] + text[stop:],
            text[:place],
        ]
    )


def changed_bytes(data: bytes, source: random.Random) -> bytes:
    """Bytes of which some are others, are cut off, come twice, or are numbers at the ends of their ranges."""
    changed = bytearray(data)
    for _ in range(source.choice((1, 1, 2, 4))):
        place = source.randrange(len(changed) + 1)
        if source.random() < 0.5:
            place = min(place, source.randrange(0, 300))  # headers come first
        width = source.choice((1, 2, 4, 8))
        number = source.choice(
            (0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), source.getrandbits(8 * width))
        )
        deed = source.random()
        if deed < 0.75:
            place -= place % width
            changed[place : place + width] = number.to_bytes(width, "little")
        elif deed < 0.85:
            del changed[place : place + source.randrange(1, 64)]
        elif deed < 0.9:
            del changed[place:]
        else:
            changed[place:place] = source.randbytes(source.randrange(1, 64))
    return bytes(changed)


def changed_safetensors(data: bytes, source: random.Random) -> bytes:
    """A file of safetensors whose header, or whose bytes, have been changed."""
    (length,) = struct.unpack("<Q", data[:8])
    if source.random() < 0.3:
        return changed_bytes(data, source)
    header = json.loads(data[8 : 8 + length])
    if source.random() < 0.3:  # a name that stands there becomes another
        name = source.choice(sorted(header))
        header[source.choice([f"{name}@3", f"{name}@x", "x", f"x.{name}", name.partition(".")[2]])] = (
            header.pop(name)
        )
    else:
        header = changed_json(header, source)
    text = json.dumps(header).encode(errors="backslashreplace")
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def change_file(path: Path, source: random.Random) -> None:
    """Change a file as its name says what it holds."""
    data = path.read_bytes()
    if path.name == "metrics.jsonl":
        lines = data.splitlines(keepends=True)
        number = source.randrange(len(lines))
        lines[number] = (
            json.dumps(changed_json(json.loads(lines[number]), source)).encode() + b"\n"
            if source.random() < 0.7
            else changed_text(lines[number].decode(), source).encode(errors="surrogateescape") + b"\n"
        )
        path.write_bytes(b"".join(lines))
    elif path.suffix == ".safetensors":
        path.write_bytes(changed_safetensors(data, source))
    elif path.suffix == ".json" and source.random() < 0.9:
        text = json.dumps(changed_json(json.loads(data), source))
        path.write_bytes(text.encode())
    elif path.suffix in (".json", ".toml", ".jinja", ".metadata"):
        text = changed_text(data.decode(), source)
        path.write_bytes(text.encode(errors="surrogateescape"))
    else:
        path.write_bytes(changed_bytes(data, source))


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _object_in(path: Path, *checksums: str) -> dict[str, Any] | None:
    """The object in a JSON file without its checksums; None where there is none any more."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    for name in checksums:
        content.pop(name, None)
    return content


def mend_dataset(folder: Path) -> None:
    """Make all checksums of a dataset fit what its files hold now, as far as its manifest still is one."""
    content = _object_in(folder / "manifest.json", "checksum")
    if content is None:
        return
    try:
        content["tokenizer"]["sha256"] = sha256(folder / "tokenizer.json")
        if "tokenizer_config_sha256" in content:
            content["tokenizer_config_sha256"] = sha256(folder / "tokenizer_config.json")
        for shard in content["shards"]:
            for suffix, key in ((".bin", "sha256"), (".idx", "index_sha256"), (".mask", "mask_sha256")):
                if key in shard:
                    shard[key] = sha256(folder / f"{shard['name']}{suffix}")
    except (OSError, ValueError, TypeError, KeyError):
        pass  # it does not say any more which files it has
    write_manifest(folder, content)
    for plan in (folder / ".mm-pack").glob("*"):
        _mend_plan(plan)
    for path in (folder / "reference").glob("*.json"):
        reference = _object_in(path, "checksum")
        if reference is not None:
            reference["sha256"] = sha256(path.with_suffix(".npy"))
            write_with_checksum(path, reference, "checksum")


def _mend_plan(path: Path) -> None:
    data = bytearray(path.read_bytes())
    if len(data) >= HEADER_BYTES:
        data[12:16] = bytes(4)
        data[12:16] = zlib.crc32(bytes(data)).to_bytes(4, "little")
        path.write_bytes(data)


def mend_run(run: Path) -> None:
    """Make all checksums of a run fit what its files hold now, as far as its records still are some."""
    content = _object_in(run / "config.json", "sha256")
    if content is not None:
        if isinstance(content.get("tokenizer"), dict):
            content["tokenizer"]["sha256"] = sha256(run / "tokenizer.json")
        write_with_checksum(run / "config.json", content, "sha256")
    for state in run.glob("checkpoints/*/state.json"):
        content = _object_in(state, "sha256")
        if content is None:
            continue
        for name in ("model.safetensors", "optimizer.safetensors"):
            try:
                path = state.with_name(name)
                content["files"][name] |= {"sha256": sha256(path), "bytes": path.stat().st_size}
            except (KeyError, TypeError):
                pass  # it does not list that file any more
        write_with_checksum(state, content, "sha256")


def mend_work(folder: Path) -> None:
    """Make the checksums of an unfinished build fit."""
    for path in folder.rglob("*.json"):
        content = _object_in(path, "checksum")
        if content is not None:
            path.write_text(json.dumps({**content, "checksum": checksum_of_json(content)}))
