"""The options of sampling. Imports no torch."""

import math
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How the next token is chosen. The defaults are MiniMind's, except for the length and `top_p`."""

    max_new_tokens: Annotated[int, "Maximum new tokens; the text may end earlier."] = 512
    temperature: Annotated[
        float, "Sampling temperature; higher is more varied, 0 always takes the most likely token."
    ] = 0.85
    top_p: Annotated[
        float, "Top-p: sample from the most likely tokens that together reach this probability."
    ] = 0.85
    top_k: Annotated[
        int, "Top-k: sample from at most this many of the most likely tokens; 0 for no limit."
    ] = 50
    seed: Annotated[int, "Random seed; the same seed gives the same text."] = 42

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, not {self.max_new_tokens}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"`seed` must be from 0 to 2^63 - 1, not {self.seed}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"`temperature` must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"`top_k` must be 0 or more, not {self.top_k}")


DEFAULTS = GenerateOptions()
"""How a model generates where nobody says how."""
