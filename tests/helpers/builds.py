"""Builds of datasets: texts to build from, options of a small one, what a folder holds, and a program that dies at any change to the disk."""

from pathlib import Path

from minimind_data.build.plan import TokenizeOptions
from minimind_data.options import options_from

TEXTS = [
    f"第{i}个问题：{i} 加 {i} 等于多少？ 等于 {2 * i}。<|im_end|> What is {i} times two? It is {2 * i}.<|im_end|>"
    + " filler" * (i % 40)
    for i in range(400)
]
"""Texts of many lengths, in two languages, with special tokens in them."""


CRASHING = """
import os, sys
from pathlib import Path
from minimind_data.build.plan import TokenizeOptions
from minimind_data.build.pipeline import tokenize

paths, crash_at = [Path(path) for path in sys.argv[1:-1]], int(sys.argv[-1])
calls = 0

def dying(name):
    real = getattr(os, name)
    def call(*arguments, **named):
        global calls
        calls += 1
        if calls == crash_at:
            os._exit(9)
        return real(*arguments, **named)
    return call

for name in ("replace", "unlink", "fsync", "mkdir", "rmdir"):
    setattr(os, name, dying(name))
"""
"""The beginning of a program `PATH... N` that ends, without any clean-up, before the N-th of its changes to the disk; it counts `calls`."""


def options(out: Path, **changes) -> TokenizeOptions:
    """Options of a build in this process, in splits so small that there are many."""
    return options_from(TokenizeOptions, {"out": out, "workers": 1, "split_bytes": 8192, **changes})


def tree(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, byte for byte."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
