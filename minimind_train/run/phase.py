"""What distinguishes one phase from another: its options, its objective, its kind of dataset.

The phases themselves are in `pretrain`, `sft` and `dpo`; a run of any of them is in `job`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal

import torch

from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.windows.base import Windows, WindowSource
from minimind_train.batches.samples import MixedWindows
from minimind_train.model.transformer import MiniMind
from minimind_train.objectives.objective import NextToken, Objective
from minimind_train.progress import Say
from minimind_train.run.initial import InitialWeights
from minimind_train.run.options import ConfigT

__all__ = ["Phase", "refuse_other_kind"]


def _next_token(model: MiniMind, *_: object) -> Objective:
    return NextToken(model)


def _windows_alone(windows: WindowSource, *_: object) -> WindowSource:
    return windows


@dataclass(frozen=True, kw_only=True)
class Phase(Generic[ConfigT]):
    """What distinguishes one kind of training from another."""

    command: str
    """What `mm-train` calls it, and what the run's record says."""
    dataset: Literal["pretrain", "sft", "dpo"]
    """The kind of dataset that it learns."""
    config: type[ConfigT]
    """Its options; made without arguments, they are its defaults."""
    objective: Callable[[MiniMind, ConfigT, InitialWeights], Objective] = _next_token
    """Returns the objective over a model, by resolved options; by default the cross-entropy of the next token."""
    samples: Callable[[Windows | MixedWindows, ConfigT, InitialWeights, torch.device, Say], WindowSource] = (
        _windows_alone
    )
    """Returns where samples are read; by default the windows, else what adds to them."""


def refuse_other_kind(phase: Phase[Any], sets: Sequence[ShardSet]) -> None:
    """Refuse datasets of a kind that the phase does not learn.

    Raises:
        UserError: one of them is; the message names it.
    """
    for shards in sets:
        kind = shards.manifest.kind
        if kind != phase.dataset:
            raise UserError(
                f"{shards.folder}: a dataset of kind {kind}, and `mm-train {phase.command}` learns kind {phase.dataset}; make one by "
                f"`mm-data tokenize --kind {phase.dataset}`, or train on this one by `mm-train {kind}`"
            )
