"""The entry points of `mm-data` and `mm-train`: Ctrl-C during the imports ends with one sentence, not a traceback."""

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
    except KeyboardInterrupt:  # during the imports; after them, the command handles it
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
