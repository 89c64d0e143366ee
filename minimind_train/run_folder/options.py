"""The options of a run's folder: which checkpoint to read, when to save and which to keep, the axis of curves. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from minimind_data.options import check_limits
from minimind_train.resume_policy import Resume

CheckpointChoice = int | Literal["best"] | None
"""Which checkpoint of a run: that of a step, that of the lowest validation loss, or the newest whole one."""


def parse_step(text: str) -> CheckpointChoice:
    """Read the name of a checkpoint: a step, or `best`.

    Raises:
        ValueError: the text is neither.
    """
    if text == "best":
        return "best"
    if not text.isdecimal() or not text.isascii():
        raise ValueError(f"{text!r} names no checkpoint; pass the step of one, such as 1000, or best")
    return int(text)


_LIMITS = {"save_every": (0, 10**12), "keep": (0, 10**12), "keep_every": (0, 10**12)}


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """When a run saves, and which checkpoints it keeps."""

    save_every: Annotated[int, "Steps between checkpoints; 0 saves only when the run ends.", Resume.FREE] = (
        1000
    )
    keep: Annotated[int, "Number of newest checkpoints to keep; 0 keeps all.", Resume.FREE] = 3
    keep_every: Annotated[
        int, "Steps between checkpoints that `keep` never deletes; 0 for none.", Resume.FREE
    ] = 0
    save_best: Annotated[
        bool,
        "Also save when the validation loss is the lowest so far, and keep that checkpoint; other "
        "commands open it as checkpoint best.",
        Resume.FREE,
    ] = False

    def __post_init__(self) -> None:
        check_limits(self, _LIMITS)


Axis = Literal["step", "tokens", "position"]
