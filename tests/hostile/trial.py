"""One trial: a folder is changed and one command reads it, watched for what it raises, touches and takes."""

import os
import random
import resource
import shutil
import signal
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from minimind_data.errors import UserError
from tests.helpers.commands import mm_data, mm_train
from tests.helpers.mutations import snapshot
from tests.hostile.changes import change_file
from tests.hostile.targets import TARGETS

MAX_SECONDS = 30
MAX_BYTES = 600 * 2**20
_MAX_ADDRESS_SPACE = 6 * 2**30
_STATUSES = (0, 1, 2, 3)
_OTHERS = "outside"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What was changed and read, and what came of it."""

    name: str
    seed: int
    changed: str
    command: str
    problem: str | None
    """What went wrong; None if nothing did."""


class _TookTooLong(BaseException):
    """Raised by the alarm, so that no `except Exception` catches it."""


def run_trial(name: str, seed: int, home: Path, place: Path) -> Trial:
    """Change a folder of a kind and let a command read it.

    Args:
        name: of the kind, one of `TARGETS`.
        seed: of what is changed and which command reads it.
        home: where `make_all` made the folders.
        place: a folder for this trial, which is emptied.
    """
    target, source = TARGETS[name], random.Random(f"{name} {seed}")
    shutil.rmtree(place, ignore_errors=True)
    (place / _OTHERS).mkdir(parents=True)
    for suffix in (".bin", ".idx", ".mask", ".json", ""):
        (place / _OTHERS / f"victim{suffix}").write_bytes(b"somebody's")
    folder = place / name
    shutil.copytree(home / name, folder)
    matches = [sorted(filter(Path.is_file, folder.glob(pattern))) for pattern in target.files]
    path = source.choice(source.choice([paths for paths in matches if paths]))
    change_file(path, source)
    target.mend(folder)
    command = source.choice(target.commands)
    before = snapshot(place / _OTHERS)
    homes_before = _stamps(home)
    problem, _ = outcome_of(command, folder, home)
    if problem is None and snapshot(place / _OTHERS) != before:
        problem = "files of another folder were changed"
    if problem is None and (touched := _stamps(home) ^ homes_before):
        problem = f"files of another folder were changed: {sorted(touched)[:3]}"
    words = command if isinstance(command, list) else [command.__name__]
    return Trial(
        name=name, seed=seed, changed=str(path.relative_to(folder)), command=" ".join(words), problem=problem
    )


def _stamps(home: Path) -> set[tuple[str, int, int]]:
    return {
        (str(path), path.stat().st_mtime_ns, path.stat().st_size)
        for path in home.rglob("*")
        if path.is_file()
    }


def outcome_of(command: object, folder: Path, home: Path) -> tuple[str | None, bool]:
    """Let a command of a target read a folder; return what went wrong, or None, and whether it refused the folder.

    Args:
        command: words or a function; see `Target`.
        folder: what it reads.
        home: where what it needs lies.
    """
    new = folder.parent / "new"
    here = Path.cwd()
    refused = False
    os.chdir(folder.parent)
    try:
        with warnings.catch_warnings(), _limits() as peak:
            warnings.simplefilter("ignore")  # a command prints them and goes on; in tests they are errors
            if callable(command):
                command(folder, new, home)
            else:
                words = [_filled(word, {"IT": folder, "NEW": new, "BESIDE": home}) for word in command]
                result = {"mm-data": mm_data, "mm-train": mm_train}[words[0]](*words[1:], input="")
                if result.exception is not None and not isinstance(result.exception, SystemExit):
                    return _description_of(result.exception), False
                if result.exit_code not in _STATUSES or "Traceback" in result.output:
                    return f"exit status {result.exit_code}: {result.output[-2000:]}", False
                if result.exit_code and len(result.output) > 20_000:
                    return f"{len(result.output)} characters: {result.output[:300]}", True
                refused = result.exit_code != 0
    except (UserError, OSError):
        refused = True
    except _TookTooLong as error:
        return f"took too long\n{_description_of(error)}", False
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        return _description_of(error), False
    finally:
        os.chdir(here)
    if peak["bytes"] > MAX_BYTES:
        return f"took {peak['bytes'] / 2**20:.0f} MB", refused
    return None, refused


def _description_of(error: BaseException) -> str:
    """The last calls of a traceback, and the error."""
    return "".join(traceback.format_exception(error)[-7:])


def _filled(word: str, places: Mapping[str, Path]) -> str:
    first, slash, rest = word.partition("/")
    stem, dot, suffix = first.partition(".")
    return f"{places[stem]}{dot}{suffix}{slash}{rest}" if stem in places else word


@contextmanager
def _limits() -> Iterator[dict[str, int]]:
    """Limit the time and the address space of the block; yield what will hold the peak of its memory."""

    def leave(*_: object) -> None:
        raise _TookTooLong

    peak = {"bytes": 0}
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    former = signal.signal(signal.SIGALRM, leave)
    before = _memory("VmRSS")
    _reset_peak()
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + _MAX_ADDRESS_SPACE, hard))
    signal.alarm(MAX_SECONDS)
    try:
        yield peak
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        peak["bytes"] = _memory("VmHWM") - before


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
