"""Threads or processes: `mm-data tokenize` on the same cores, as one process with threads, as several, as one for each core.

    python benchmarks/engines.py TEXT.jsonl [--tokenizer DIR] [--cores N] [--rounds 3] [--repeat 1]

`mm-data tokenize` uses four cores in a process before it starts another one (minimind_data/build/workers.py). Here each run uses
another number, in a process of its own that sets the constant before the command starts. Splits are so small that every process
has several. All runs must write the same bytes. Memory is that of a first, untimed run. Needs Linux.
"""

import argparse
import hashlib
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from inputs import write_copies
from machine import describe_machine
from processes import Memory, hold_to_cores, timed, watched

_SPLITS_PER_CORE = 4
_AS_CHILD = "--with-cores-per-process"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=1)
    arguments = parser.parse_args()
    hold_to_cores(arguments.cores)
    ways = [cores for cores in range(arguments.cores, 0, -1) if arguments.cores % cores == 0]
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        text, out = Path(folder) / "text.jsonl", Path(folder) / "out"
        num_bytes = write_copies(arguments.input, text, arguments.repeat)
        split_bytes = max(1024, -(-num_bytes // (_SPLITS_PER_CORE * arguments.cores)))
        command = ["tokenize", str(text), "--out", str(out), "--workers", str(arguments.cores)]
        command += ["--split-bytes", str(split_bytes)]
        command += ["--tokenizer", str(arguments.tokenizer)] if arguments.tokenizer else []
        commands = {
            cores: [sys.executable, str(Path(__file__)), _AS_CHILD, str(cores), *command] for cores in ways
        }
        memories: dict[int, Memory] = {}
        digests: set[str] = set()
        for cores in ways:
            shutil.rmtree(out, ignore_errors=True)
            memories[cores] = watched(commands[cores])
            digests.add(_digest(out))
        if len(digests) != 1:
            sys.exit("the ways wrote different bytes")
        seconds: dict[int, list[float]] = {cores: [] for cores in ways}
        for _ in range(arguments.rounds):
            for cores in ways:
                shutil.rmtree(out, ignore_errors=True)
                seconds[cores].append(timed(commands[cores]))
    print(f"{describe_machine()}; {num_bytes / 1e6:.1f} MB, median of {arguments.rounds} rounds\n")
    print("| processes × threads | seconds | MB/s | peak MB |")
    print("|---|---|---|---|")
    for cores in ways:
        median = statistics.median(seconds[cores])
        print(
            f"| {arguments.cores // cores} × {cores} | {median:.2f} | {num_bytes / 1e6 / median:.1f} "
            f"| {memories[cores].total_mb:.0f} |"
        )


def run_child(cores_per_process: int, arguments: list[str]) -> None:
    """Run `mm-data` with another number of cores for each process."""
    from minimind_cli import entry  # noqa: PLC0415 - only the child is the command
    from minimind_data.build import engines  # noqa: PLC0415 - likewise

    engines.CORES_PER_PROCESS = cores_per_process  # what is measured
    sys.argv = ["mm-data", *arguments]
    entry.data()


def _digest(out: Path) -> str:
    shards = json.loads((out / "manifest.json").read_bytes())["shards"]
    return hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    if sys.argv[1:2] == [_AS_CHILD]:
        run_child(int(sys.argv[2]), sys.argv[3:])
    else:
        main()
