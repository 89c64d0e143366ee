"""A trained model with its tokenizer, ready for use: from a run folder or from a Hugging Face folder.

For generation and evaluation. To train on from weights, see `start`; to load weights without a tokenizer, `pretrained`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from minimind_data.errors import UserError
from minimind_data.options import build, flatten
from minimind_data.tokenizer import Tokenizer, load_tokenizer
from minimind_train.foreign_weights import is_hf_folder
from minimind_train.model import MiniMind
from minimind_train.model_config import ModelConfig
from minimind_train.pretrained import load_weights, model_of
from minimind_train.progress import Say
from minimind_train.runs import RunRecord, load_run_tokenizer
from minimind_train.trained import CheckpointChoice

__all__ = ["Opened", "open_trained"]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A trained model, ready for use."""

    model: MiniMind
    """On the CPU, in evaluation mode."""
    tokenizer: Tokenizer
    record: RunRecord | None
    """The run's record; None for a Hugging Face folder."""


def open_trained(
    path: Path,
    *,
    step: CheckpointChoice,
    say: Say,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> Opened:
    """Open the model of a run or of a Hugging Face folder.

    Args:
        path: its folder; a run may still be training.
        step: of a run, whose checkpoint; the newest whole one by default, or `best`.
        say: is told of damaged checkpoints.
        changes: options of the model that are to differ, such as those of its positions.

    Raises:
        UserError: there is no such model, or nothing that says which token begins a text.
    """
    if not is_hf_folder(path):
        record = RunRecord.read(path)
        model = model_of(path, step=step, say=say, changes=changes)
        tokenizer = load_run_tokenizer(path, record.tokenizer)
        return Opened(model=model, tokenizer=tokenizer, record=record)
    if step is not None:
        raise UserError(f"{path}: is no run, so it has no checkpoint of a step; leave --checkpoint out")
    try:
        tokenizer = load_tokenizer(path)
    except UserError as error:
        why = str(error).partition(";")[0]
        raise UserError(f"{why}; put it into the folder, or into its tokenizer_config.json") from None
    weights = load_weights(path, say=say)
    try:
        config = build(ModelConfig, {**flatten(weights.config), **changes})
    except ValueError as error:
        raise UserError(f"{path}: its model cannot be used like that: {error}") from None
    model = MiniMind(config).eval()
    model.load_state_dict(weights.tensors)
    return Opened(model=model, tokenizer=tokenizer, record=None)
