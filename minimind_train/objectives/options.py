"""The options of objectives. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """Options of what is learned; the cross-entropy of the next token has none."""


LossType = Literal["sigmoid", "hinge", "ipo"]


@dataclass(frozen=True, kw_only=True)
class PreferenceOptions(ObjectiveOptions):
    """How DPO learns from pairs; the default of beta is MiniMind's."""

    beta: Annotated[float, "DPO beta: weight of the penalty for moving away from the reference model."] = 0.15
    loss_type: Annotated[LossType, "Loss: sigmoid as in the DPO paper, hinge as in SLiC, ipo as in IPO."] = (
        "sigmoid"
    )
    label_smoothing: Annotated[
        float,
        "Label smoothing: assumed share of pairs that are labelled the wrong way round; with "
        "loss-type sigmoid.",
    ] = 0.0
    length_normalised: Annotated[
        bool, "Take the mean of the log-probabilities of an answer's tokens, not their sum."
    ] = False
    reference: Annotated[
        Literal["cached", "online"],
        "Log-probabilities of the reference model: cached, computed once and kept beside the shards; or "
        "online, by a frozen copy in every step.",
    ] = "cached"

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"`beta` must be a positive number, not {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"`label_smoothing` must be at least 0 and below 0.5, not {self.label_smoothing}"
            )
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"`label_smoothing` goes with `loss_type` sigmoid, not {self.loss_type}")
