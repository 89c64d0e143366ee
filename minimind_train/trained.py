"""The model of a run, as one of its checkpoints has it; the run may still be training."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from minimind_data.errors import UserError
from minimind_data.options import build
from minimind_train import checkpoint
from minimind_train.checkpoint import Checkpoint, GoneCheckpointError
from minimind_train.model import MiniMind
from minimind_train.model_config import ModelConfig
from minimind_train.progress import Say

_MAX_TRIES = 5


Which = int | Literal["best"] | None
"""Which checkpoint of a run: that of a step, that of the lowest validation loss, or the newest whole one."""


def parse_step(text: str) -> Which:
    """Read what names a checkpoint: a step, or `best`.

    Raises:
        ValueError: the text is neither; the message says so.
    """
    if text == "best":
        return "best"
    if not text.isdecimal() or not text.isascii():
        raise ValueError(f"{text!r} names no checkpoint; pass the step of one, such as 1000, or best")
    return int(text)


def model_of(
    run: Path, *, step: Which, say: Say, changes: Mapping[str, Any] = MappingProxyType({})
) -> MiniMind:
    """Return the model of a run, on the CPU, in the mode of use.

    Args:
        run: its folder.
        step: whose checkpoint.
        say: is told of damaged checkpoints.
        changes: options of the model that are to differ from the run's, such as those of its positions.

    Raises:
        UserError: there is no such checkpoint, or no such model.
    """
    return model_and_step_of(run, step=step, say=say, changes=changes)[0]


def model_and_step_of(
    run: Path, *, step: Which, say: Say, changes: Mapping[str, Any] = MappingProxyType({})
) -> tuple[MiniMind, int]:
    """Return what `model_of` does, and the step of the checkpoint."""
    if step is not None:
        found = checkpoint.load_best(run) if step == "best" else checkpoint.load(run, step)
        return _restored(found, changes)
    for _ in range(_MAX_TRIES - 1):  # a run that is training may delete a checkpoint that is being read
        with contextlib.suppress(GoneCheckpointError):
            return _restored(_newest(run, say), changes)
    return _restored(_newest(run, say), changes)


def _newest(run: Path, say: Say) -> Checkpoint:
    found = checkpoint.load_latest(run, say)
    if found is None:
        raise UserError(
            f"{run}: no checkpoint yet; the first comes after --save-every steps, or when the run ends"
        )
    return found


def _restored(found: Checkpoint, changes: Mapping[str, Any]) -> tuple[MiniMind, int]:
    try:
        config = build(ModelConfig, {**found.state.config, **changes})
    except ValueError as error:
        raise UserError(f"{found.folder}: its model cannot be used like that: {error}") from None
    model = MiniMind(config).eval()
    found.restore(model)
    return model, found.state.step
