"""Whether the tests notice mistakes: `python -m tests.mutation` makes them in a copy of the project, one by one, and says which no test minds.

A mutant that no test can mind, because it does the same, stands in equal.txt with the reason. The exit status is 1 if there are others.

The copy is a temporary folder. It goes when the work ends, also when it is interrupted; after SIGKILL, the next run takes it away.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

from tests.mutation.mutants import Mutant, mutants_of
from tests.mutation.running import Tests, copy_project

ROOT = Path(__file__).parents[2]
EQUAL = Path(__file__).with_name("equal.txt")
NEAREST = {
    "minimind_data/permutation.py": ["tests/data/test_permutation.py"],
    "minimind_train/order": ["tests/train/order"],
    "minimind_data/dataset": [
        "tests/data/dataset",
        "tests/data/windows/test_windows.py",
        "tests/data/interchange",
    ],
    "minimind_data/windows": ["tests/data/windows"],
    "minimind_data/inputs": ["tests/data/inputs", "tests/data/build/test_build.py"],
    "minimind_data/chat": ["tests/data/chat", "tests/data/build/test_chat_datasets.py"],
    "minimind_train/objectives": ["tests/train/objectives"],
    "minimind_train/batches": ["tests/train/batches", "tests/train/training/test_loop.py"],
    "minimind_train/run_folder": ["tests/train/run_folder", "tests/train/run/test_finished_runs.py"],
}
"""The packages that are mutated, and the tests nearest to each."""


def read_equal(text: str) -> dict[tuple[str, str, str], str]:
    """Mutants that are judged equal: the reason by (path, line, mutated line); `*` is whatever the line may become."""
    reasons = {}
    for block in text.split("\n\n"):
        lines = [line for line in block.strip().splitlines() if not line.startswith("#")]
        if lines:
            path, was, becomes, *reason = lines
            reasons[path, was.removeprefix("- "), becomes.removeprefix("+ ")] = " ".join(reason)
    return reasons


def is_equal(path: str, mutant: Mutant, equal: Container[tuple[str, str, str]]) -> bool:
    """Whether a mutant is among those that are judged equal."""
    return (path, mutant.was, mutant.becomes) in equal or (path, mutant.was, "*") in equal


def modules_of(names: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield (a package, paths of its modules) for what the command line names: packages, or single modules."""
    for package in NEAREST:
        modules = sorted((ROOT / package).glob("*.py")) or [ROOT / package]
        paths = [path.relative_to(ROOT).as_posix() for path in modules]
        paths = [path for path in paths if not names or any(path.startswith(name) for name in names)]
        if paths:
            yield package, paths


def sampled(mutants: list[tuple[str, Mutant]], every: int, seed: int) -> list[tuple[str, Mutant]]:
    """About one of so many, the same ones for a seed, however other lines change.

    Whether a mutant is among them follows from its path, the line, what it becomes, and how many such mutants stand before it in the module.
    """
    occurrences, chosen = Counter(), []
    for path, mutant in mutants:
        name = (path, mutant.was, mutant.becomes)
        digest = hashlib.sha256(json.dumps([seed, *name, occurrences[name]]).encode()).digest()
        occurrences[name] += 1
        if int.from_bytes(digest[:8], "little") % every == 0:
            chosen.append((path, mutant))
    return chosen


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder that is locked while it is in use; those that nobody uses any more are removed."""
    for left in Path(tempfile.gettempdir()).glob("mutants-*"):
        with contextlib.suppress(OSError), locked(left):
            shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, locked(Path(folder)):
        yield Path(folder).resolve()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which a process that is killed gives back.

    Raises:
        BlockingIOError: another process holds it.
    """
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(opened)


def at_least_one(text: str) -> int:
    """A number that something is divided by."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def main() -> int:
    """Mutate, test, and say what survived."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument(
        "--module",
        action="append",
        default=[],
        help="a package or module, as a path; by default all that have tests",
    )
    parser.add_argument("--every", type=at_least_one, default=1, help="about one mutant of so many")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    equal = read_equal(EQUAL.read_text("utf-8"))
    known, num_tested, num_survivors, began = set(), 0, 0, time.monotonic()
    with scratch_folder() as folder:
        copy = folder / "project"
        copy.mkdir()
        copy_project(ROOT, copy)
        for package, paths in modules_of(arguments.module):
            mutants = [
                (path, mutant) for path in paths for mutant in mutants_of((copy / path).read_text("utf-8"))
            ]
            known |= {
                (path, mutant.was, becomes) for path, mutant in mutants for becomes in (mutant.becomes, "*")
            }
            mutants = sampled(mutants, arguments.every, arguments.seed)
            mutants = [each for each in mutants if not is_equal(*each, equal)]
            print(f"{package}: {len(mutants)} mutants", flush=True)
            num_tested += len(mutants)
            for path, mutant in Tests(copy, NEAREST[package]).survivors(mutants):
                num_survivors += 1
                print(f"{path}:{mutant.line}\n- {mutant.was}\n+ {mutant.becomes}\n", flush=True)
        stale = [
            key
            for key in equal
            if any(key[0] in paths for _, paths in modules_of(arguments.module)) and key not in known
        ]
    minutes = (time.monotonic() - began) / 60
    print(f"{num_tested} mutants in {minutes:.0f} minutes, {num_survivors} of which no test minds")
    for path, was, becomes in stale:
        print(f"equal.txt has what is no mutant any more: {path}\n- {was}\n+ {becomes}")
    return 1 if num_survivors or stale else 0


if __name__ == "__main__":
    sys.exit(main())
