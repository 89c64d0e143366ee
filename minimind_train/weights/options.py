"""From which weights a run begins, and in what form weights are written. Imports no torch."""

from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

from minimind_train.resume_policy import Before, Resume
from minimind_train.run_folder.options import CheckpointChoice, parse_step

NO_WEIGHTS: Final = "none"
"""What `from_weight` is called where a run begins from random weights, though the phase has others by default."""


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """From which weights a run begins."""

    from_weight: Annotated[
        str | None,
        "Initial weights: the folder of a run, a Hugging Face folder, or MiniMind's .pth; none for random "
        "ones. A folder decides the shape of the model; for a .pth the options must give it.",
        Resume.ORIGIN,
        Before(None),
    ] = None
    from_step: Annotated[
        CheckpointChoice,
        "With `from_weight`: step of the checkpoint, or best; by default the newest complete one.",
        parse_step,
        Resume.ORIGIN,
    ] = None
    from_sha256: Annotated[str | None, Resume.DERIVED] = field(default=None, metadata={"flag": False})
    """SHA-256 of the weights that the run began from, over names, shapes and bits; the same in whatever file they lie."""

    def __post_init__(self) -> None:
        if self.from_weight == NO_WEIGHTS:
            object.__setattr__(self, "from_weight", None)
        if self.from_step is not None and self.from_weight is None:
            raise ValueError("`from_step` says which checkpoint of `from_weight`; pass both or neither")


Target = Literal["hf", "minimind", "minimind-lora", "peft", "gguf"]

WeightDtype = Literal["fp32", "bf16", "fp16", "q8_0"]
