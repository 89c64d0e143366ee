"""Direct preference optimization: a model learns to prefer one answer to another, relative to a frozen reference model.

For a pair of answers to one prompt, chosen and rejected, the **reward** of each is beta times the difference between its log-probability
and the reference's; the **margin** is the reward of the chosen answer minus that of the rejected one. The published loss is
-log sigmoid(margin) (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, eq. 7). The options change it:

- `label_smoothing` e: a share e of the pairs is assumed to be labelled the wrong way round (Mitchell 2023, conservative DPO);
- `loss_type` hinge: max(0, 1 - margin) (SLiC, Zhao et al. 2023, https://arxiv.org/abs/2305.10425);
- `loss_type` ipo: (margin / beta - 1 / (2 beta))^2 (Azar et al. 2023, https://arxiv.org/abs/2310.12036, eq. 17);
- `length_normalised`: log-probabilities are means over an answer's tokens, not sums, so that length does not matter.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from minimind_data.dataset.format import IGNORED
from minimind_train.model.transformer import MiniMind
from minimind_train.objectives.losses import summed_log_probs
from minimind_train.objectives.objective import MicroLoss, Objective
from minimind_train.objectives.options import PreferenceOptions

__all__ = ["REFERENCE", "Preference", "log_probs_of_pairs"]

REFERENCE = "reference_log_probs"
"""The name, in a batch, of the reference's log-probabilities: float32 [B, 2]."""


class Preference(Objective):
    """The loss of pairs; its terms are the pairs.

    Args:
        model: the model that is trained.
        options: beta, and the variants of the loss.
        reference: returns the reference's summed log-probabilities of a micro-batch, float32 [B, 2].
    """

    def __init__(
        self,
        model: MiniMind,
        options: PreferenceOptions,
        reference: Callable[[Mapping[str, Tensor]], Tensor],
    ) -> None:
        super().__init__(model)
        self.options = options
        self._reference = reference

    def forward(self, micro_batch: Mapping[str, Tensor]) -> MicroLoss:
        """Return the losses of `chosen_input_ids`, `chosen_targets`, and the same of `rejected`, int64 [B, seq_len] each.

        The reference gets the same micro-batch, which may hold more.
        """
        log_probs, balance = log_probs_of_pairs(self.model, micro_batch)
        reference = self._reference(micro_batch)
        if self.options.length_normalised:
            lengths = _lengths(micro_batch)
            log_probs, reference = log_probs / lengths, reference / lengths
        rewards = self.options.beta * (log_probs - reference)
        margins = rewards[:, 0] - rewards[:, 1]
        with torch.no_grad():
            metrics = {
                "reward_margin": margins.sum(),
                "reward_accuracy": (margins > 0).float().sum(),
                "chosen_reward": rewards[:, 0].sum(),
                "rejected_reward": rewards[:, 1].sum(),
                "chosen_log_prob": log_probs[:, 0].sum(),
                "rejected_log_prob": log_probs[:, 1].sum(),
            }
        return MicroLoss(self._losses(margins).sum(), auxiliary=balance, metrics=metrics)

    def _losses(self, margins: Tensor) -> Tensor:
        beta, smoothing = self.options.beta, self.options.label_smoothing
        if self.options.loss_type == "hinge":
            return functional.relu(1 - margins)
        if self.options.loss_type == "ipo":
            return (margins / beta - 1 / (2 * beta)).square()
        right, wrong = functional.logsigmoid(margins), functional.logsigmoid(-margins)
        return -(1 - smoothing) * right - smoothing * wrong

    @staticmethod
    def num_terms(samples: Mapping[str, NDArray[np.int64]]) -> int:
        """Return the number of pairs."""
        return len(samples["chosen_input_ids"])


def log_probs_of_pairs(model: MiniMind, micro_batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return the summed log-probabilities of (chosen, rejected) answers, float32 [B, 2], and the load-balancing loss of experts."""
    input_ids, targets = (
        torch.cat([micro_batch[f"{side}_{name}"] for side in ("chosen", "rejected")])
        for name in ("input_ids", "targets")
    )
    hidden, balance = model.hidden_and_balance(input_ids)
    return summed_log_probs(hidden, model.head_weight, targets).view(2, -1).t(), balance


def _lengths(micro_batch: Mapping[str, Tensor]) -> Tensor:
    """Return how many targets each side has, at least 1: float32 [B, 2]."""
    counts = [(micro_batch[f"{side}_targets"] != IGNORED).sum(-1) for side in ("chosen", "rejected")]
    return torch.stack(counts, dim=-1).clamp(min=1).float()
