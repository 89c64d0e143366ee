"""Weights that were trained before, from wherever a run can begin."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minimind_data.errors import UserError
from minimind_data.format import TokenizerInfo
from minimind_train.model_config import ModelConfig
from minimind_train.progress import Say, say_on_stderr
from minimind_train.runs import CONFIG_NAME, RunRecord
from minimind_train.trained import model_and_step_of

__all__ = ["Weights", "checksum_of_tensors", "load_weights"]


class Weights(NamedTuple):
    """The weights of a model, and what is known of it."""

    config: ModelConfig
    """Its shape, resolved."""
    tensors: dict[str, Tensor]
    """By parameter name, float32 on the CPU: what a `MiniMind` of this shape loads."""
    tokenizer: TokenizerInfo | None
    """What it was trained with; None where the files do not say."""
    step: int | None = None
    """Of the checkpoint, where they are a run's."""


def load_weights(path: Path, *, step: int | None = None, say: Say = say_on_stderr) -> Weights:
    """Return weights that were trained before.

    Args:
        path: the folder of a run.
        step: whose checkpoint; the newest whole one by default.
        say: is told of damaged checkpoints.

    Raises:
        UserError: there are no weights, or no checkpoint of that step.
    """
    if not (path / CONFIG_NAME).is_file():
        there = "no weights there" if path.exists() else "no such folder"
        raise UserError(f"{path}: {there}; pass the folder of a run by --from-weight")
    tokenizer = RunRecord.read(path).tokenizer
    model, step = model_and_step_of(path, step=step, say=say)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return Weights(config=model.config.resolved(), tensors=tensors, tokenizer=tokenizer, step=step)


def checksum_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the hexadecimal SHA-256 of weights: their names, shapes and bits, in whatever file they lie."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
