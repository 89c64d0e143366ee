"""The three phases beside each other: pre-training, supervised fine-tuning, direct preference optimization.

Each is its options with their defaults, an objective and a kind of dataset, and one call to `entry.begin`, which runs every phase.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from minimind_data.windows.base import Windows, WindowSource
from minimind_train.batches.samples import MixedWindows
from minimind_train.model.config import ModelConfig
from minimind_train.model.lora import LoraConfig
from minimind_train.model.transformer import MiniMind
from minimind_train.objectives.preference import REFERENCE, Preference, PreferenceOptions, log_probs_of_pairs
from minimind_train.objectives.reference import Reference, ReferencedWindows, reference_log_probs
from minimind_train.progress import Say, say_on_stderr
from minimind_train.run import entry as job
from minimind_train.run.initial import InitialWeights
from minimind_train.run.options import DataConfig, StartConfig
from minimind_train.run.phase import Phase
from minimind_train.training import loop
from minimind_train.training.evaluate import ValidationConfig
from minimind_train.training.optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Where the reference's log-probabilities come from."""

    reference: Annotated[
        Literal["cached", "online"],
        "cached: computed once and kept beside the shards; online: in every step, by a frozen copy of the model.",
    ] = "cached"


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """Everything that a run of direct preference optimization can be told; the defaults are MiniMind's."""

    default_epochs: ClassVar[int] = 1

    start: StartConfig = field(default_factory=partial(StartConfig, from_weight="runs/sft"))
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=partial(DataConfig, layout="pad", seq_len=1024))
    preference: PreferenceOptions = field(default_factory=PreferenceOptions)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=partial(OptimConfig, learning_rate=4e-8))
    training: loop.RunConfig = field(
        default_factory=partial(loop.RunConfig, run=Path("runs/dpo"), global_batch=4, micro_batch=4)
    )
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        if self.data.layout != "pad":
            raise ValueError(f"layout must be pad, a pair a window, not {self.data.layout}")


def _objective(model: MiniMind, config: DpoConfig, origin: InitialWeights) -> Preference:
    if config.reference.reference == "cached":
        return Preference(model, config.preference, lambda micro_batch: micro_batch[REFERENCE])
    frozen = origin.model("--reference online compares with it")

    def online(micro_batch: Mapping[str, Tensor]) -> Tensor:
        frozen.to(
            micro_batch["chosen_input_ids"].device
        )  # where the model itself is not yet, if it will be sharded
        with torch.no_grad():
            return log_probs_of_pairs(frozen, micro_batch)[0]

    return Preference(model, config.preference, online)


def _samples(
    windows: Windows | MixedWindows, config: DpoConfig, origin: InitialWeights, device: torch.device, say: Say
) -> WindowSource:
    """Put the reference's log-probabilities beside each pair."""
    if config.reference.reference == "online":
        return windows
    assert origin.checksum is not None
    training = config.training
    reference = Reference(weights=origin.checksum, seq_len=config.data.seq_len, dtype=training.dtype)
    found = [
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
    return ReferencedWindows(windows, found[0] if len(found) == 1 else np.concatenate(found))


DPO = Phase(command="dpo", dataset="dpo", config=DpoConfig, objective=_objective, samples=_samples)


def dpo(config: DpoConfig, say: Say = say_on_stderr) -> loop.Outcome:
    """Begin a run and train until it ends or a signal stops it; see `job.begin`."""
    return job.begin(DPO, config, say)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything that a pre-training run can be told."""

    default_epochs: ClassVar[int] = 2

    start: StartConfig = field(default_factory=StartConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    training: loop.RunConfig = field(default_factory=loop.RunConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


PRETRAIN = Phase(command="pretrain", dataset="pretrain", config=PretrainConfig)


def pretrain(config: PretrainConfig, say: Say = say_on_stderr) -> loop.Outcome:
    """Begin a run and train until it ends or a signal stops it; see `job.begin`."""
    return job.begin(PRETRAIN, config, say)


def resume(
    run: Path,
    given: Mapping[str, Any],
    *,
    allow_change: Collection[str] = (),
    say: Say = say_on_stderr,
) -> loop.Outcome:
    """Go on with a run from its newest whole checkpoint; see `job.resume`."""
    return job.resume(PRETRAIN, run, given, allow_change=allow_change, say=say)


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Everything that a run of supervised fine-tuning can be told; the defaults are MiniMind's."""

    default_epochs: ClassVar[int] = 2

    start: StartConfig = field(default_factory=partial(StartConfig, from_weight="runs/pretrain"))
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=partial(DataConfig, layout="pad", seq_len=768))
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=partial(OptimConfig, learning_rate=1e-5))
    training: loop.RunConfig = field(
        default_factory=partial(loop.RunConfig, run=Path("runs/sft"), global_batch=16, micro_batch=16)
    )
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        if self.data.layout == "concat":
            raise ValueError(
                "layout concat cuts conversations apart, and an answer without its question teaches nothing; take pad or pack"
            )


SFT = Phase(command="sft", dataset="sft", config=SftConfig)


def sft(config: SftConfig, say: Say = say_on_stderr) -> loop.Outcome:
    """Begin a run and train until it ends or a signal stops it; see `job.begin`."""
    return job.begin(SFT, config, say)
