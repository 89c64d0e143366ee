"""Where `mm-data` and `mm-train` begin: nothing is imported before Ctrl-C is one sentence."""

import importlib
import sys


def data() -> None:
    """Run `mm-data`."""
    _run("data")


def train() -> None:
    """Run `mm-train`."""
    _run("train")


def _run(module: str) -> None:
    try:
        importlib.import_module(f"{__package__}.{module}").main()
    except KeyboardInterrupt:  # while libraries were still being imported; later, the command itself answers
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
