"""Finds what hostile files can do: `python -m tests.hostile` changes folders by the thousand and lets commands read them.

Each trial is named by its kind and its seed, and can be repeated with `--only KIND --first SEED --trials 1`. The exit status is 1 if one
raised anything but an error for the user, touched files of others, or took too much time or memory.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.hostile.targets import TARGETS, make_all
from tests.hostile.trial import run_trial


def main() -> int:
    """Run the trials and print those that went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.hostile")
    parser.add_argument("--trials", type=int, default=100, help="of each kind")
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    parser.add_argument("--only", choices=TARGETS, help="one kind alone")
    arguments = parser.parse_args()
    problems: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        home, place = Path(folder) / "home", Path(folder) / "trial"
        home.mkdir()
        make_all(home)
        for name in [arguments.only] if arguments.only else TARGETS:
            begin = time.monotonic()
            for seed in range(arguments.first, arguments.first + arguments.trials):
                trial = run_trial(name, seed, home, place)
                if trial.problem is not None:
                    problems[name] += 1
                    print(
                        f"\n{name} {seed}: {trial.changed} changed, read by {trial.command}\n{trial.problem}",
                        flush=True,
                    )
            seconds = time.monotonic() - begin
            print(
                f"{name}: {arguments.trials} trials, {problems[name]} problems, {seconds:.0f} s", flush=True
            )
    return 1 if problems.total() else 0


if __name__ == "__main__":
    sys.exit(main())
