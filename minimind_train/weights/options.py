"""In what form weights are written. Imports no torch."""

from typing import Literal

Target = Literal["hf", "minimind", "peft"]


WeightDtype = Literal["fp32", "bf16", "fp16"]
