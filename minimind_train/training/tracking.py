"""Trackers: metrics in TensorBoard, Weights & Biases and SwanLab.

`metrics.jsonl` is the record of a run, and trackers only show it. So a run goes on whatever a tracker does: if one cannot start, or fails
later, the user is told once and it is not used again.

After a resume the tracker's run is continued. TensorBoard's events after the checkpoint are marked as void (`purge_step`) and written
again. The other trackers keep what they have, so steps that were sent before the run stopped are not sent again; their numbers are the
same unless an option was changed. The ids of their runs are in `tracking/ids.json`. They take their mode and the user's login from where
their own documentation says (WANDB_MODE, SWANLAB_MODE, a login).
"""

import contextlib
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from minimind_data.files import parse_json, write_atomic
from minimind_train.progress import Say
from minimind_train.run_folder.metrics import MetricsLog, NoMetrics

TRACKING_FOLDER_NAME = "tracking"
_IDS_NAME = "ids.json"


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What trackers are told about a run."""

    folder: Path
    project: str
    options: Mapping[str, Any]
    step: int
    """Completed steps."""


class Tracker(Protocol):
    """One tracker, for one run."""

    rewinds: bool
    """Whether it drops the numbers of steps that are trained again after a resume. (All trackers keep texts.)"""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a step."""

    def text(self, step: int, name: str, text: str) -> None:
        """Take a text that belongs to a step."""

    def close(self) -> None:
        """Send what has not been sent yet."""


class Trackers:
    """Writes lines of metrics to their file and sends them to the run's trackers; a context manager.

    Args:
        metrics: the file.
        names: the trackers.
        run: what they are told about the run.
        say: takes lines for the user.
    """

    def __init__(
        self, metrics: MetricsLog | NoMetrics, names: tuple[str, ...], run: TrackedRun, say: Say
    ) -> None:
        self._metrics = metrics
        self._say = say
        self._trackers: dict[str, Tracker] = {}
        self._sent_until: dict[str, int] = {}
        known_ids = _read_ids(run.folder)
        ids: dict[str, str] = {
            name: known_ids.get(name) or secrets.token_hex(8) for name in names if name != "tensorboard"
        }
        if ids.items() - known_ids.items():
            (run.folder / TRACKING_FOLDER_NAME).mkdir(exist_ok=True)
            write_atomic(
                run.folder / TRACKING_FOLDER_NAME / _IDS_NAME, json.dumps(known_ids | ids, indent=1) + "\n"
            )
        former_trackers = {*known_ids, *(["tensorboard"] if _tensorboard_folder(run.folder).exists() else [])}
        for name in names:
            # A tracker that is new to the run has been sent nothing, however far the metrics go.
            self._sent_until[name] = metrics.former_last_step if name in former_trackers else 0
            self._open(name, run, ids.get(name, ""))

    def write(self, record: dict[str, Any]) -> None:
        """Write a line of metrics, and send its numbers."""
        self._metrics.write(record)
        numbers = _numbers(record)
        step = record["step"]
        self._for_each(
            lambda name, tracker: (
                tracker.log(step, numbers) if tracker.rewinds or step > self._sent_until[name] else None
            )
        )

    def text(self, step: int, name: str, text: str) -> None:
        """Send a text."""
        self._for_each(
            lambda tracker_name, tracker: (
                tracker.text(step, name, text) if step > self._sent_until[tracker_name] else None
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, Exception):  # a second Ctrl-C waits for no network
            self._for_each(lambda _, tracker: tracker.close())

    def _open(self, name: str, run: TrackedRun, run_id: str) -> None:
        try:
            self._trackers[name] = TRACKERS[name](run, run_id)
        except ImportError as error:
            self._say(
                f"`track` {name}: {error.name or name} is not installed; pip install 'minimind-pipeline[{name}]'; the run goes on "
                "without it, and metrics.jsonl has all the numbers"
            )
        except Exception as error:  # noqa: BLE001 - whatever a tracker does, the run goes on
            self._drop(name, error)

    def _for_each(self, action: Callable[[str, Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                action(name, tracker)
            except Exception as error:  # noqa: BLE001 - see `_open`
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        self._trackers.pop(name, None)
        reason = " ".join(str(error).split()) or type(error).__name__
        self._say(
            f"`track` {name}: {reason}; the run goes on without it, and metrics.jsonl has all the numbers"
        )


class _TensorBoard:
    rewinds = True

    def __init__(self, run: TrackedRun, _: str) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an extra, and seconds to import

        self._writer = SummaryWriter(
            str(_tensorboard_folder(run.folder)), purge_step=run.step + 1 if run.step else None
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    rewinds = False

    def __init__(self, run: TrackedRun, run_id: str) -> None:
        import wandb  # noqa: PLC0415 - an extra

        folder = run.folder / TRACKING_FOLDER_NAME
        folder.mkdir(exist_ok=True)
        self._run = wandb.init(
            project=run.project,
            name=run.folder.absolute().name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=dict(run.options),
            settings=wandb.Settings(console="off"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: text}, step=step)

    def close(self) -> None:
        self._run.finish()


class _SwanLab:
    rewinds = False

    def __init__(self, run: TrackedRun, run_id: str) -> None:
        import swanlab  # noqa: PLC0415 - an extra

        self._library = swanlab
        self._run = swanlab.init(
            project=run.project,
            name=run.folder.absolute().name,
            id=run_id,
            resume="allow",
            log_dir=str(run.folder / TRACKING_FOLDER_NAME / "swanlab"),
            config=dict(run.options),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: self._library.Text(text)}, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[TrackedRun, str], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "swanlab": _SwanLab,
}
"""Opens a tracker for a run and the ID that it has there, by name."""


def _numbers(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers in a line of metrics by name; those of `{"epochs": {"zh": 1.5}}` as `epochs/zh`."""
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            numbers |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and prefix + name != "step":
            numbers[prefix + name] = value
    return numbers


def _tensorboard_folder(run: Path) -> Path:
    return run / TRACKING_FOLDER_NAME / "tensorboard"


def _read_ids(run: Path) -> dict[str, str]:
    # Without this file they get new ids, so the trackers begin another run.
    with contextlib.suppress(OSError, ValueError):
        ids = parse_json((run / TRACKING_FOLDER_NAME / _IDS_NAME).read_bytes())
        if isinstance(ids, dict):
            return {name: run_id for name, run_id in ids.items() if isinstance(run_id, str)}
    return {}
