"""The options of training: the optimizer, the length and size of a run, what it measures, shows and reports. Imports no torch."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from minimind_data.options import check_limits
from minimind_train.model.config import Dtype
from minimind_train.resume_policy import Before, Resume
from minimind_train.run_folder.options import SaveOptions

_MAX_STEPS = 10**12  # an exact number as a float too


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """The optimizer and its schedule; the defaults are MiniMind's pre-training."""

    optimizer: Annotated[
        Literal["adamw", "muon"],
        "adamw for all weights; or muon for the matrices inside of layers, adamw for the rest.",
    ] = "adamw"
    learning_rate: Annotated[float, "Learning rate at its peak; it ends at a tenth of it."] = 5e-4
    warmup_steps: Annotated[int, "Steps over which the learning rate rises from zero."] = 0
    weight_decay: Annotated[float, "Weight decay apart from the gradient, on all weights."] = 0.01
    beta1: Annotated[float, "AdamW's memory of the gradient."] = 0.9
    beta2: Annotated[float, "AdamW's memory of the squared gradient."] = 0.999
    eps: Annotated[float, "AdamW's guard against division by zero."] = 1e-8
    muon_momentum: Annotated[float, "Muon's memory of the gradient."] = 0.95
    grad_clip: Annotated[float, "Longest gradient norm that is let through; 0 lets all through."] = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, not {getattr(self, name)}")
        if not 0 <= self.warmup_steps <= _MAX_STEPS:
            raise ValueError(f"warmup_steps must be from 0 to {_MAX_STEPS}, not {self.warmup_steps}")
        for name in ("weight_decay", "grad_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative or without end, but is {getattr(self, name)}")
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """On what, and how often, a run is measured."""

    val_shards: Annotated[
        str | None, "DIR, a dataset to measure the model on as it learns; of the same tokenizer.", Resume.FREE
    ] = None
    val_every: Annotated[
        int, "Steps from one measurement to the next; the last step always has one.", Resume.FREE
    ] = 1000
    val_batches: Annotated[
        int,
        "Global batches of it, the same every time, spread evenly over it; 0 takes all of it.",
        Resume.FREE,
    ] = 0

    def __post_init__(self) -> None:
        check_limits(self, {"val_every": (1, 10**12), "val_batches": (0, 10**12)})


@dataclass(frozen=True, kw_only=True)
class ExcerptOptions:
    """How often a run shows what its model writes, and after what."""

    sample_every: Annotated[
        int, "Steps from one excerpt of what the model writes to the next; 0 for none.", Resume.FREE
    ] = 0
    sample_prompt: Annotated[
        tuple[str, ...], "Text that an excerpt goes on from. Repeatable.", Resume.FREE
    ] = ("",)
    sample_tokens: Annotated[int, "Most tokens of an excerpt.", Resume.FREE] = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_prompt", tuple(self.sample_prompt) or ("",))
        check_limits(self, {"sample_every": (0, 10**12), "sample_tokens": (1, 2**20)})


TRACKERS = ("tensorboard", "wandb", "swanlab")
"""What metrics can be shown in."""


@dataclass(frozen=True, kw_only=True)
class TrackOptions:
    """Where metrics go besides metrics.jsonl."""

    track: Annotated[
        tuple[str, ...],
        "tensorboard, wandb or swanlab: shows the metrics there too. Repeatable.",
        Resume.FREE,
    ] = ()
    track_project: Annotated[
        str, "The project in W&B and SwanLab; the run has the name of its folder.", Resume.FREE
    ] = "minimind"

    def __post_init__(self) -> None:
        object.__setattr__(self, "track", tuple(dict.fromkeys(self.track)))
        for name in self.track:
            if name not in TRACKERS:
                raise ValueError(f"track must be {', '.join(TRACKERS)}, not {name!r}")


Parallel = Literal["ddp", "fsdp"]


OnNonfinite = Literal["stop", "skip"]


MOST_IN_A_ROW = 10
"""So many steps that are skipped one after another are no accident any more: the run ends."""


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
    """How long, how large, how often: what every phase asks of the loop."""

    run: Annotated[Path, "Folder of the run: its options, metrics and checkpoints.", Resume.UNRECORDED] = (
        Path("runs/pretrain")
    )
    epochs: Annotated[
        int | None, "Times through the dataset; where --steps says nothing, 2, and 1 in dpo.", Resume.END
    ] = None
    steps: Annotated[int | None, "Optimizer steps of the whole run, in place of --epochs.", Resume.END] = None
    global_batch: Annotated[int, "Windows in an optimizer step, over all devices."] = 256
    micro_batch: Annotated[
        int, "Windows that go through the model at once; less takes less memory.", Resume.UNLESS_BALANCED
    ] = 32
    seed: Annotated[int, "Seed of the first weights, of the order and of dropout."] = 42
    device: Annotated[str, "auto, cpu, cuda, cuda:1, …", Resume.FREE] = "auto"
    nproc: Annotated[
        int,
        "Processes on this machine that learn together, each with a device of its own; torchrun starts them on many.",
        Resume.FREE,
    ] = 1
    parallel: Annotated[
        Parallel,
        "What several processes share: ddp, the batch; fsdp, the weights and the optimizer's state too, for models that outgrow a device.",
        Resume.FREE,
    ] = "ddp"
    dtype: Annotated[
        Dtype, "Of matrix products; auto is bf16 where the device has it natively, else fp32."
    ] = "auto"
    tf32: Annotated[
        bool, "Let a GPU that can compute float32 matrix products in TF32, which is faster.", Before(False)
    ] = True
    compile: Annotated[
        bool, "Compile the layers, which makes them faster once they have been.", Resume.FREE
    ] = False
    activation_checkpointing: Annotated[
        bool,
        "Compute the layers' activations again in the backward pass: less memory, a third more work.",
        Resume.FREE,
    ] = False
    threads: Annotated[int, "CPU threads of torch; 0 leaves the choice to torch.", Resume.FREE] = 0
    saving: SaveOptions = field(default_factory=SaveOptions)
    max_hours: Annotated[
        float,
        "Hours of training after which the run saves and leaves with status 124, so that --resume can go on; 0 for no limit.",
        Resume.FREE,
    ] = 0.0
    on_nonfinite: Annotated[
        OnNonfinite,
        f"What a loss or gradient that is no number does: stop the run, or skip the step, {MOST_IN_A_ROW - 1} in a row at most.",
        Resume.FREE,
    ] = "stop"
    tracking: TrackOptions = field(default_factory=TrackOptions)
    excerpts: ExcerptOptions = field(default_factory=ExcerptOptions)
    log_every: Annotated[int, "Steps from one line of metrics to the next.", Resume.FREE] = 10

    def __post_init__(self) -> None:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("--epochs and --steps both say when the run ends; pass one of them")
        check_limits(self, _LIMITS)
