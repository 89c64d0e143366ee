"""Rotary positions: the angle by which each pair of a head is rotated, at every position.

This is the rotate-half convention of Llama and Qwen (https://arxiv.org/abs/2104.09864). A position is the index in the row or in the
document. The options can turn on YaRN (https://arxiv.org/abs/2309.00071).

Shapes: B batch, L positions, D size of a head.
"""

import torch
from torch import Tensor

from minimind_train.model.config import ModelConfig

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, [L, 1, D/2]; [B, L, 1, D/2] where positions start again inside of rows."""


def rotary_tables(start: int, stop: int, config: ModelConfig, device: torch.device) -> Rotary:
    """Return cosines and sines of the positions [start, stop), each float32 [L, 1, D/2].

    They are computed anew in every pass: that costs nothing compared with a layer, and a table that is not kept
    can neither be too short nor end up in a checkpoint.
    """
    scaling = config.rope_scaling
    angles = torch.arange(start, stop, device=device).float()[:, None, None] * _frequencies(config, device)
    cos, sin = angles.cos(), angles.sin()
    if scaling.inference_rope_scaling and scaling.yarn_attention_factor != 1:
        return cos * scaling.yarn_attention_factor, sin * scaling.yarn_attention_factor
    return cos, sin


def _frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Return the radians by which each pair is rotated from one position to the next, float32 [D/2].

    YaRN does not change pairs that rotate `beta_fast` times or more in the original context, divides the frequencies of
    those that rotate `beta_slow` times or less by the factor, and interpolates between the two.
    """
    size, scaling = config.head_size, config.rope_scaling
    frequencies = 1.0 / (config.rope_theta ** (torch.arange(0, size, 2, device=device).float() / size))
    if not scaling.inference_rope_scaling:
        return frequencies

    low, high = config.yarn_ramp
    pairs = torch.arange(size // 2, device=device).float()
    ramp = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / scaling.yarn_factor * ramp


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pair (x[i], x[i + D/2]) of every head by the i-th angle of its position."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
