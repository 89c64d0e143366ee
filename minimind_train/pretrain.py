"""Pre-training as a phase: its options and their defaults, and one call to `job`, which runs every phase."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from minimind_train import job, loop
from minimind_train.config import DataConfig, StartConfig
from minimind_train.evaluate import ValidationConfig
from minimind_train.lora import LoraConfig
from minimind_train.model_config import ModelConfig
from minimind_train.optim import OptimConfig
from minimind_train.phase import Phase
from minimind_train.progress import Say, say_on_stderr

__all__ = ["PRETRAIN", "PretrainConfig", "pretrain", "resume"]


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
