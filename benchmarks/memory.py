"""Peak memory of `mm-data tokenize` as its input grows, of all its processes together.

    python benchmarks/memory.py TEXT.jsonl [--tokenizer DIR] [--sizes 1,4,16] [--workers 1,2,8]

An input of size 4 is four different copies of the text (see inputs.py), because every piece of an identical copy would be in the
encoder's caches. processes.py says how memory is counted. Shards have the default size, so a small input is one shard, made by one
process whatever --workers is. Needs Linux.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from inputs import write_copies
from machine import describe_machine
from processes import watched


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--sizes", type=_numbers, default=[1, 4, 16])
    parser.add_argument("--workers", type=_numbers, default=[1, 2, 8])
    arguments = parser.parse_args()
    print(describe_machine(), end="\n\n")
    print("| input | workers | processes | peak MB | without pages of files |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        text, out = Path(folder) / "text.jsonl", Path(folder) / "out"
        for size in arguments.sizes:
            megabytes = write_copies(arguments.input, text, size) / 1e6
            for workers in arguments.workers:
                shutil.rmtree(out, ignore_errors=True)
                command = [str(Path(sys.executable).with_name("mm-data")), "tokenize", str(text)]
                command += ["--out", str(out), "--workers", str(workers)]
                command += ["--tokenizer", str(arguments.tokenizer)] if arguments.tokenizer else []
                memory = watched(command)
                print(
                    f"| {size} × the text, {megabytes:.1f} MB | {workers} | {memory.processes} "
                    f"| {memory.total_mb:.0f} | {memory.anonymous_mb:.0f} |",
                    flush=True,
                )


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
