"""The task of every peer's loading program, and how all of them are measured. It needs only what every peer's environment has.

A program peers/load_NAME.py passes to `run` what is the tool's own: how it writes a stream of tokens, how it reads batches from any
batch on, and how a dataset of a given length is made without its bytes. What is measured, and from when to when, is decided here, once.

A batch is (inputs, targets), both int64 [batch, seq_len], contiguous.
"""

import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

_UNTIMED_BATCHES = 20
"""At the beginning of a warm measurement: workers start, buffers fill, pages are mapped in."""

_IGNORED = -100

Batches = Callable[["LoadTask", int], Iterable[tuple[Any, Any]]]


@dataclass(frozen=True, kw_only=True)
class LoadTask:
    """One task for a loader."""

    action: str
    """`write` or `grow` the tool's own dataset; `check` it, `warm` the page cache with it, `read`, or `resume`."""
    stream: Path
    """All tokens end to end, uint16 without a header."""
    lengths: Path
    """Tokens of each document, int64 without a header."""
    text: Path
    """JSON lines with `text`, a window each, for a loader that tokenizes."""
    tokenizer: Path
    """A tokenizer.json; tokenizer_config.json lies beside it."""
    folder: Path
    """The tool's own: where it writes and reads."""
    kept: Path
    """A folder in which a check leaves what was read."""
    num_windows: int
    """Of the stream, or of the dataset that `grow` makes."""
    bos_id: int
    eos_id: int
    vocab_size: int
    workers: int = 0
    batch: int = 64
    seq_len: int = 512
    seconds: float = 0.0
    """`read` for so long, again and again; or, where it is 0,"""
    batches: int = 0
    """read so many from the opening on."""

    @property
    def tokens(self) -> np.ndarray:
        """The stream, memory-mapped."""
        return np.memmap(self.stream, np.uint16, "r")

    def documents(self) -> Iterator[np.ndarray]:
        """The documents of the stream."""
        stops = np.cumsum(np.fromfile(self.lengths, np.int64)).tolist()
        tokens = self.tokens
        return (tokens[start:stop] for start, stop in itertools.pairwise([0, *stops]))

    def windows(self) -> Iterator[np.ndarray]:
        """The windows of the stream, `seq_len` + 1 tokens each; the last token of each is the first of the next."""
        tokens, width = self.tokens, self.seq_len
        return (tokens[start : start + width + 1] for start in range(0, len(tokens) - width, width))

    def as_dict(self) -> dict[str, Any]:
        """Return the task as JSON has it."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}

    @classmethod
    def of(cls, content: dict[str, Any]) -> Self:
        """Return the task from such JSON."""
        kinds = {field.name: field.type for field in dataclasses.fields(cls)}
        return cls(**{name: Path(value) if kinds[name] is Path else value for name, value in content.items()})


def run(
    *,
    write: Callable[[LoadTask], float | None],
    batches: Batches,
    grow: Callable[[LoadTask], float | None],
    is_shifted: bool = True,
) -> None:
    """Run the tasks in a file one after the other, and write the figures of each into another file.

    The arguments of the program are these two files, and the time at which its process was started.

    Args:
        write: writes `task.stream` in the tool's own format into `task.folder`; it may return the extra seconds of the first opening.
        batches: opens the dataset and reads from this batch of the first epoch on, as after a stop there.
        grow: makes, in `task.folder`, a dataset of `task.num_windows` windows as far as the tool can tell.
        is_shifted: targets are the inputs shifted by one token; else they are the inputs, to be shifted in the model.
    """
    imported, started = time.monotonic(), float(sys.argv[3])
    figures = []
    for content in json.loads(Path(sys.argv[1]).read_bytes()):
        task = LoadTask.of(content)
        figure: dict[str, Any] = {"imports": imported - started, "imports_mb": _anonymous_mb()}
        if task.action in ("write", "grow"):
            figure["index_seconds"] = {"write": write, "grow": grow}[task.action](task)
        elif task.action == "check":
            _check(task, batches, is_shifted)
        elif task.action == "warm":
            _warm(task.folder)
        elif task.action == "read":
            figure |= _read(task, batches)
        else:
            figure["resume"] = _resume(task, batches)
        figures.append(figure)
    Path(sys.argv[2]).write_text(json.dumps(figures))
    sys.stdout.flush()
    os._exit(0)  # the parent ends the workers; nothing waits for them here


def _warm(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(2**24):
                    pass


def _resume(task: LoadTask, batches: Batches) -> float:
    opened = time.monotonic()
    batch = next(iter(batches(task, task.num_windows // task.batch // 2)))
    seconds = time.monotonic() - opened
    _shape_of(batch, task)
    return seconds


def _read(task: LoadTask, batches: Batches) -> dict[str, float]:
    opened = time.monotonic()
    source = _epochs(task, batches)
    _shape_of(next(source), task)
    first = time.monotonic()
    tokens = task.batch * task.seq_len
    if task.batches:
        for _ in range(task.batches - 1):
            next(source)
        speed = task.batches * tokens / (time.monotonic() - opened)
    else:
        for _ in range(_UNTIMED_BATCHES):
            next(source)
        begun, count = time.monotonic(), 0
        while (seconds := time.monotonic() - begun) < task.seconds:
            next(source)
            count += 1
        speed = count * tokens / seconds
    return {"first_batch": first - opened, "tokens_per_second": speed}


def _epochs(task: LoadTask, batches: Batches) -> Iterator[tuple[Any, Any]]:
    while True:
        yield from batches(task, 0)


def _check(task: LoadTask, batches: Batches, is_shifted: bool) -> None:
    """Save the inputs of one epoch, and those of a resume in its middle."""
    count = task.num_windows // task.batch
    for name, start in (("epoch", 0), ("resumed", count // 2)):
        kept = []
        for inputs, targets in itertools.islice(batches(task, start), count - start):
            _shape_of((inputs, targets), task)
            expected, shifted = (inputs[:, 1:], targets[:, :-1]) if is_shifted else (inputs, targets)
            assert bool(((shifted == expected) | (shifted == _IGNORED)).all()), (
                "the targets do not fit the inputs"
            )
            kept.append(inputs.numpy().astype(np.uint16))
        np.save(task.kept / f"{name}.npy", np.concatenate(kept))


def _shape_of(batch: tuple[Any, Any], task: LoadTask) -> None:
    for tensor in batch:
        form = str(tensor.dtype), tuple(tensor.shape), tensor.is_contiguous()
        assert form == ("torch.int64", (task.batch, task.seq_len), True), form


def _anonymous_mb() -> float:
    """Return the memory of this process without pages of files, in MB of 10^6 bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    kibibytes = next(line.split()[1] for line in lines if line.startswith("Pss_Anon:"))
    return int(kibibytes) * 1024 / 1e6
