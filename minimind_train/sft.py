"""Supervised fine-tuning: a trained model learns to answer, from conversations of which only the answers are learned."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

from minimind_train import job, loop
from minimind_train.config import DataConfig, StartConfig
from minimind_train.evaluate import ValidationConfig
from minimind_train.lora import LoraConfig
from minimind_train.model_config import ModelConfig
from minimind_train.optim import OptimConfig
from minimind_train.phase import Phase
from minimind_train.progress import Say, say_on_stderr

__all__ = ["SFT", "SftConfig", "sft"]


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
