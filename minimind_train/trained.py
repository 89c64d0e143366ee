"""The model of a run, as one of its checkpoints has it; the run may still be training."""

import contextlib
from pathlib import Path

from minimind_data.errors import UserError
from minimind_data.options import build
from minimind_train import checkpoint
from minimind_train.checkpoint import Checkpoint, GoneCheckpointError
from minimind_train.model import MiniMind, ModelConfig
from minimind_train.progress import Say

_MAX_TRIES = 5


def model_of(run: Path, *, step: int | None, say: Say) -> MiniMind:
    """Return the model of a run, on the CPU, in the mode of use.

    Args:
        run: its folder.
        step: whose checkpoint; the newest whole one by default.
        say: is told of damaged checkpoints.

    Raises:
        UserError: there is no such checkpoint.
    """
    return _newest_model_patiently(run, say) if step is None else _restored(checkpoint.load(run, step))


def _newest_model_patiently(run: Path, say: Say) -> MiniMind:
    """Return the newest model of a run, which may be training, and may delete a checkpoint that is being read."""
    for _ in range(_MAX_TRIES - 1):
        with contextlib.suppress(GoneCheckpointError):
            return _newest_model(run, say)
    return _newest_model(run, say)


def _newest_model(run: Path, say: Say) -> MiniMind:
    found = checkpoint.load_latest(run, say)
    if found is None:
        raise UserError(
            f"{run}: no checkpoint yet; the first comes after --save-every steps, or when the run ends"
        )
    return _restored(found)


def _restored(found: Checkpoint) -> MiniMind:
    model = MiniMind(build(ModelConfig, found.state.config)).eval()
    found.restore(model)
    return model
