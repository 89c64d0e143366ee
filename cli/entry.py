"""The entry points of `mm-data` and `mm-train`, and Ctrl-C before the work begins and after it has ended: one sentence, no traceback.

While a command works, its interrupt is handled in `options`.
"""

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

_NO_WINDOWS = "error: Windows itself is not supported; use WSL2: `wsl --install` in PowerShell, then install and run this in its Linux"
_STATUS = 128 + signal.SIGINT


def data() -> None:
    """Run `mm-data`."""
    _run("data")


def train() -> None:
    """Run `mm-train`."""
    _run("train")


def _run(module: str) -> None:
    if (
        sys.platform == "win32"
    ):  # before anything is imported: what the packages need of the system is not there
        print(_NO_WINDOWS, file=sys.stderr)
        sys.exit(1)
    try:
        with importing():
            main = importlib.import_module(f"{__package__}.{module}").main
        main()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(_STATUS)
    finally:
        die_of_interrupts()


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Let Ctrl-C end this process at once, with a sentence, while the block imports modules, which can take seconds.

    Nothing has begun by then. An exception could come out of the middle of a C library's import as another one, with its traceback.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former_handler = signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former_handler)


def _leave(*_: object) -> None:
    with contextlib.suppress(OSError):  # there may be nobody to read it
        os.write(2, b"error: interrupted\n")
    os._exit(_STATUS)


def die_of_interrupts() -> None:
    """Let Ctrl-C end this process as it ends any program from here on: all that is left is to end, where Python would show a traceback."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
