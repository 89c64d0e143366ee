"""What a user sees of a run: a progress line on a terminal, a plain line now and then elsewhere.

Everything goes to stderr; what must be kept goes to metrics.jsonl.
"""

import math
import shutil
import sys
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from minimind_data.reporting import Say

__all__ = ["Say", "TrainingProgress", "WindowProgress", "say_on_stderr"]

_MAX_COLUMNS = 80
_SPARE_COLUMNS = 3
"""At the end of the progress line: room for the ^C that a terminal echoes, which would begin another line."""
_SECONDS_BETWEEN_LINES = 5.0


def say_on_stderr(line: str) -> None:
    """Print a line, above the progress line if there is one."""
    tqdm.write(line, file=sys.stderr)


class _ProgressLine:
    """Something that a line on a terminal shows, where there is one; a context manager, which closes the line."""

    _bar: tqdm | None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


class TrainingProgress(_ProgressLine):
    """How far a run is, and the line that shows it; a context manager.

    Args:
        step: steps that are already done.
        total_steps: steps of the whole run.
        say: takes the plain lines.
        visible: whether a terminal shows it.

    Attributes:
        step: steps that are done.
        total_steps: steps of the whole run.
    """

    def __init__(self, *, step: int, total_steps: int, say: Say, visible: bool = True) -> None:
        self.step = step
        self.total_steps = total_steps
        self._say = say
        self._last_details: tuple[str | None, list[int]] = (None, [])
        self._last_line = -math.inf
        form = "{n_fmt}/{total_fmt}{postfix} {remaining} left {bar}"
        self._bar = _bar(form, total=total_steps, initial=step) if visible else None

    def update(self, record: dict[str, Any], *, logged: bool) -> None:
        """Count one finished step and show it; `record` is its line of metrics, `logged` says whether that line was written."""
        self.step = record["step"]
        loss = f"loss {record['loss']:.4f}" if "loss" in record else "skipped"
        numbers = f"{loss}  lr {record['lr']:.2e}  {record['tokens_per_second']:,.0f} tok/s"
        if "val_loss" in record:
            self._say(f"step {record['step']}/{self.total_steps}  validation {_validation(record)}")
        if "reward_margin" in record:
            numbers += f"  margin {record['reward_margin']:.3f}"
        shard = record.get("shard")
        position = f"  next {shard}:{record['offset']}" if shard else ""
        epochs: dict[str, float] = record.get("epochs", {})
        if epochs:
            position += "  epochs " + " ".join(f"{name} {done:.2f}" for name, done in epochs.items())
        if self._bar is None:
            now = time.monotonic()
            if logged and (
                record["step"] == self.total_steps or now - self._last_line >= _SECONDS_BETWEEN_LINES
            ):
                self._last_line = now
                self._say(f"step {record['step']}/{self.total_steps}  {numbers}{position}")
            return
        self._bar.postfix = numbers.replace("  ", " ")
        self._bar.update()
        details = (shard, [int(done) for done in epochs.values()])
        if details != self._last_details:  # the progress line has no room for what seldom changes
            if position:
                self._say(f"step {record['step']}:{position}".replace("  ", " "))
            self._last_details = details


class WindowProgress(_ProgressLine):
    """How far an evaluation is, on a terminal; erased when it is done. A context manager."""

    def __init__(self, num_windows: int) -> None:
        self._bar = _bar("{n_fmt}/{total_fmt} windows {remaining} left {bar}", total=num_windows, leave=False)

    def add(self, num_windows: int) -> None:
        """Show that so many more windows are evaluated."""
        if self._bar is not None:
            self._bar.update(num_windows)


def _bar(form: str, **options: Any) -> tqdm | None:
    """Return a progress line on stderr, of at most the usual width, or None where stderr is not a terminal."""
    if not sys.stderr.isatty():
        return None
    columns = min(_MAX_COLUMNS, shutil.get_terminal_size().columns) - _SPARE_COLUMNS
    return tqdm(file=sys.stderr, ncols=columns, bar_format=form, **options)


def _validation(record: dict[str, Any]) -> str:
    loss = f"loss {record['val_loss']:.4f}"
    if "val_perplexity" in record:
        return f"{loss}  perplexity {record['val_perplexity']:,.2f}  {record['val_bits_per_byte']:.4f} bits a byte"
    return (
        f"{loss}  reward margin {record['val_reward_margin']:.4f}  accuracy {record['val_reward_accuracy']:.4f} of "
        f"{record['val_pairs']:,} pairs"
    )
