"""Inputs for benchmarks: longer ones made of one text, with copies that differ, in the forms that the peers need.

An encoder caches the pieces of text that it has seen. If a text were just repeated, every piece of the second copy would be in the
cache, which is not so for a real corpus. So each copy after the first is changed: runs of Chinese characters are rotated and get one
character from elsewhere in the text, words of six letters or more get one letter from elsewhere. Short words, white space,
punctuation and special tokens stay, because they recur in any text.
"""

import json
import random
import re
from pathlib import Path

_RUNS = re.compile(r"<\|\w+\|>|[一-鿿]{2,}|[A-Za-z]{6,}")
_CHINESE = re.compile(r"[一-鿿]")
_DEFAULT_CHINESE = "的一是不了"


def write_copies(source: Path, target: Path, copies: int) -> int:
    """Write `copies` different copies of JSON lines, the first one unchanged; return the bytes written.

    The same source and number give the same bytes.
    """
    lines = source.read_bytes()
    with target.open("wb") as out:
        out.write(lines if lines.endswith(b"\n") else lines + b"\n")
        for copy in range(1, copies):
            chance = random.Random(copy)  # noqa: S311 - not for cryptography
            for line in lines.splitlines():
                record = json.loads(line)
                record["text"] = unlike(record["text"], copy, chance)
                out.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    return target.stat().st_size


def unlike(text: str, copy: int, chance: random.Random) -> str:
    """Return a text of the same length and kind whose longer pieces are different."""
    characters = _CHINESE.findall(text) or _DEFAULT_CHINESE

    def change(match: re.Match[str]) -> str:
        run = match[0]
        if run[0] == "<":
            return run
        place = int(chance.random() * len(run))
        if run[0].isascii():
            return run[:place] + chr(97 + int(chance.random() * 26)) + run[place + 1 :]
        run = run[:place] + characters[int(chance.random() * len(characters))] + run[place + 1 :]
        shift = copy % len(run)
        return run[shift:] + run[:shift]

    return _RUNS.sub(change, text)


def write_parts(source: Path, folder: Path, count: int, *, with_ids: bool = False) -> None:
    """Cut JSON lines into `count` files of almost equal size, in order; `with_ids` adds an `id` to each record."""
    folder.mkdir()
    lines = source.read_bytes().splitlines(keepends=True)
    total = sum(map(len, lines))
    part, done = 0, 0
    out = (folder / f"{part:05d}.jsonl").open("wb")
    for number, line in enumerate(lines):
        if part + 1 < count and done >= (part + 1) * total / count:
            out.close()
            part += 1
            out = (folder / f"{part:05d}.jsonl").open("wb")
        done += len(line)
        out.write(
            json.dumps({"id": str(number), "text": json.loads(line)["text"]}, ensure_ascii=False).encode()
            + b"\n"
            if with_ids
            else line
        )
    out.close()
