"""The options of training: the optimizer, the length and size of a run, what it measures, shows and reports. Imports no torch."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from minimind_data.options import as_paths, check_limits
from minimind_train.model.config import Dtype
from minimind_train.resume_policy import Before, Resume
from minimind_train.run_folder.options import SaveOptions

_MAX_STEPS = 10**12  # an exact number as a float too


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """The optimizer and its schedule; the defaults are MiniMind's pre-training."""

    optimizer: Annotated[
        Literal["adamw", "muon"],
        "Optimizer: adamw for all weights; or muon for the matrices inside the layers, adamw for the rest.",
    ] = "adamw"
    learning_rate: Annotated[float, "Peak learning rate; a cosine decays it to a tenth."] = 5e-4
    warmup_steps: Annotated[int, "Warmup steps, in which the learning rate rises from zero."] = 0
    weight_decay: Annotated[float, "Decoupled weight decay, on all weights."] = 0.01
    beta1: Annotated[float, "Adam beta1: decay of the average of gradients."] = 0.9
    beta2: Annotated[float, "Adam beta2: decay of the average of squared gradients."] = 0.999
    eps: Annotated[float, "Adam epsilon, against division by zero."] = 1e-8
    muon_momentum: Annotated[float, "Muon momentum."] = 0.95
    grad_clip: Annotated[
        float, "Maximum gradient norm, to which larger gradients are scaled down; 0 for no limit."
    ] = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be a positive number, not {getattr(self, name)}")
        if not 0 <= self.warmup_steps <= _MAX_STEPS:
            raise ValueError(f"`warmup_steps` must be from 0 to {_MAX_STEPS}, not {self.warmup_steps}")
        for name in ("weight_decay", "grad_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"`{name}` must not be negative or without end, but is {getattr(self, name)}"
                )
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 0 and below 1, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """Validation: on which dataset, and how often."""

    val_shards: Annotated[
        str | None, "DIR: a dataset with the same tokenizer, for validation during training.", Resume.FREE
    ] = None
    val_every: Annotated[int, "Steps between validations; the last step always has one.", Resume.FREE] = 1000
    val_batches: Annotated[
        int,
        "Global batches in a validation, spread evenly over the dataset and the same every time; 0 uses all.",
        Resume.FREE,
    ] = 0

    def __post_init__(self) -> None:
        check_limits(self, {"val_every": (1, 10**12), "val_batches": (0, 10**12)})


@dataclass(frozen=True, kw_only=True)
class ExcerptOptions:
    """Excerpts: how often the model writes a sample of text, and from which prompts."""

    sample_every: Annotated[
        int, "Steps between excerpts of text that the model writes; 0 for none.", Resume.FREE
    ] = 0
    sample_prompt: Annotated[tuple[str, ...], "Prompt of an excerpt. Repeatable.", Resume.FREE] = ("",)
    sample_tokens: Annotated[int, "Maximum new tokens of an excerpt.", Resume.FREE] = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_prompt", tuple(self.sample_prompt) or ("",))
        check_limits(self, {"sample_every": (0, 10**12), "sample_tokens": (1, 2**20)})


TRACKERS = ("tensorboard", "wandb", "swanlab")
"""The services that metrics can be sent to."""


@dataclass(frozen=True, kw_only=True)
class TrackOptions:
    """Where metrics go besides metrics.jsonl."""

    track: Annotated[
        tuple[str, ...],
        "Also log metrics to tensorboard, wandb or swanlab. Repeatable.",
        Resume.FREE,
    ] = ()
    track_project: Annotated[
        str, "Project in W&B and SwanLab; the run is named after its folder.", Resume.FREE
    ] = "minimind"

    def __post_init__(self) -> None:
        object.__setattr__(self, "track", tuple(dict.fromkeys(self.track)))
        for name in self.track:
            if name not in TRACKERS:
                raise ValueError(f"`track` must be {', '.join(TRACKERS)}, not {name!r}")


Parallel = Literal["ddp", "fsdp"]


OnNonfinite = Literal["stop", "skip"]


MOST_IN_A_ROW = 10
"""After this many skipped steps in a row the run ends: it is not an accident any more."""


_LIMITS = {
    # So that no position of a run leaves 64 bits, and no count of steps the exact numbers of a float.
    "epochs": (1, 10**6),
    "steps": (1, 10**12),
    "global_batch": (1, 2**20),
    "micro_batch": (1, 2**20),
    "log_every": (1, 10**12),
    "seed": (0, 2**64 - 1),
    "max_hours": (0, 10**6),
    "nproc": (1, 1024),
    "threads": (0, 1024),  # far above any machine; torch itself crashes on far more
}


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The length, the size and the intervals of a run, of whatever phase."""

    run: Annotated[Path, "Folder of the run: its options, metrics and checkpoints.", Resume.UNRECORDED] = (
        Path("runs/pretrain")
    )
    epochs: Annotated[int | None, "Epochs; by default 2, in dpo 1, unless `steps` is given.", Resume.END] = (
        None
    )
    steps: Annotated[int | None, "Optimizer steps of the whole run, instead of `epochs`.", Resume.END] = None
    global_batch: Annotated[int, "Global batch size: windows in an optimizer step, over all devices."] = 256
    micro_batch: Annotated[
        int,
        "Micro-batch size: windows in one pass on a device; fewer need less memory.",
        Resume.UNLESS_BALANCED,
    ] = 32
    seed: Annotated[int, "Random seed of initial weights, order and dropout."] = 42
    device: Annotated[str, "auto, cpu, cuda, cuda:1, …", Resume.FREE] = "auto"
    nproc: Annotated[
        int,
        "Processes on this machine, each with its own device; for several machines use torchrun.",
        Resume.FREE,
    ] = 1
    parallel: Annotated[
        Parallel,
        "Data parallelism: ddp keeps all weights on every device; fsdp shards weights and optimizer "
        "state, for models too large for one device.",
        Resume.FREE,
    ] = "ddp"
    dtype: Annotated[
        Dtype, "Dtype of matrix products; auto is bf16 if the device has it natively, else fp32."
    ] = "auto"
    tf32: Annotated[
        bool,
        "Let GPUs compute float32 matrix products in TF32, which is faster and less exact.",
        Before(False),
    ] = True
    compile: Annotated[
        bool, "Compile the layers with torch.compile: a slower start, faster steps.", Resume.FREE
    ] = False
    activation_checkpointing: Annotated[
        bool,
        "Activation checkpointing: recompute activations in the backward pass; less memory, a third "
        "more work.",
        Resume.FREE,
    ] = False
    threads: Annotated[int, "CPU threads for torch; 0 lets torch choose.", Resume.FREE] = 0
    saving: SaveOptions = field(default_factory=SaveOptions)
    max_hours: Annotated[
        float,
        "Maximum hours of training, after which the run saves and exits with status 124; `resume` "
        "continues it. 0 for no limit.",
        Resume.FREE,
    ] = 0.0
    on_nonfinite: Annotated[
        OnNonfinite,
        f"On a loss or gradient that is not finite: stop the run, or skip the step, at most {MOST_IN_A_ROW - 1} in a row.",
        Resume.FREE,
    ] = "stop"
    tracking: TrackOptions = field(default_factory=TrackOptions)
    excerpts: ExcerptOptions = field(default_factory=ExcerptOptions)
    log_every: Annotated[int, "Steps between lines of metrics.", Resume.FREE] = 10

    def __post_init__(self) -> None:
        as_paths(self, "run")
        if self.epochs is not None and self.steps is not None:
            raise ValueError("`epochs` and `steps` both say when the run ends; pass one of them")
        check_limits(self, _LIMITS)
