"""In what phases differ besides their options: the objective, and what is read along with the windows.

Its options and their defaults are in `options`; a run of any phase is begun and resumed in `entry`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.windows.base import Windows, WindowSource
from minimind_train.batches.mixed_windows import MixedWindows
from minimind_train.model.transformer import MiniMind
from minimind_train.objectives.objective import NextToken, Objective
from minimind_train.objectives.preference import REFERENCE, Preference, log_probs_of_pairs
from minimind_train.objectives.reference import Reference, ReferencedWindows, reference_log_probs
from minimind_train.progress import Say
from minimind_train.run.initial import InitialWeights
from minimind_train.run.options import DpoOptions, RunOptions

__all__ = ["PHASES", "Phase", "refuse_other_kind"]


def _next_token(model: MiniMind, *_: object) -> Objective:
    return NextToken(model)


def _windows_alone(windows: WindowSource, *_: object) -> WindowSource:
    return windows


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A kind of training: what distinguishes it from others besides its options."""

    objective: Callable[[MiniMind, RunOptions, InitialWeights], Objective] = _next_token
    """Returns the objective over a model, by resolved options; by default the cross-entropy of the next token."""
    samples: Callable[
        [Windows | MixedWindows, RunOptions, InitialWeights, torch.device, Say], WindowSource
    ] = _windows_alone
    """Returns where samples are read from; by default the windows as they are."""


def _preference(model: MiniMind, options: RunOptions, origin: InitialWeights) -> Preference:
    """Return the objective for pairs, whose reference is the model that the run began from."""
    assert isinstance(options, DpoOptions)
    if options.objective.reference == "cached":
        return Preference(model, options.objective, lambda micro_batch: micro_batch[REFERENCE])
    frozen = origin.model("`reference` online compares with it")

    def online(micro_batch: Mapping[str, Tensor]) -> Tensor:
        # Moved only here: when the objective is made, a model that will be sharded is still on the CPU.
        frozen.to(micro_batch["chosen_input_ids"].device)
        with torch.no_grad():
            return log_probs_of_pairs(frozen, micro_batch)[0]

    return Preference(model, options.objective, online)


def _referenced(
    windows: Windows | MixedWindows,
    options: RunOptions,
    origin: InitialWeights,
    device: torch.device,
    say: Say,
) -> WindowSource:
    """Add the reference's log-probabilities to each pair."""
    assert isinstance(options, DpoOptions)
    if options.objective.reference == "online":
        return windows
    assert origin.checksum is not None
    training = options.training
    reference = Reference(weights=origin.checksum, seq_len=options.data.seq_len, dtype=training.dtype)
    log_probs = [
        reference_log_probs(
            part,
            reference,
            lambda: origin.model("the reference's log-probabilities are not beside the dataset"),
            batch=training.micro_batch,
            device=device,
            say=say,
        )
        for part in (windows.parts if isinstance(windows, MixedWindows) else [windows])
    ]
    return ReferencedWindows(windows, log_probs[0] if len(log_probs) == 1 else np.concatenate(log_probs))


PHASES: Mapping[str, Phase] = {
    "pretrain": Phase(),
    "sft": Phase(),
    "dpo": Phase(objective=_preference, samples=_referenced),
}
"""The phases, by what `mm-train` calls them."""


def refuse_other_kind(options: RunOptions, sets: Sequence[ShardSet]) -> None:
    """Refuse datasets of a kind that the phase of these options does not learn.

    Raises:
        UserError: one of them is; the message names it.
    """
    for shards in sets:
        kind, kind_learned = shards.manifest.kind, options.dataset_kind
        if kind != kind_learned:
            raise UserError(
                f"a dataset of kind {kind}, and `mm-train {options.command}` learns kind {kind_learned}",
                where=shards.folder,
                remedy=f"make one by `mm-data tokenize` with `kind` {kind_learned}, or train on this one by `mm-train {kind}`",
                option="shards",
            )
