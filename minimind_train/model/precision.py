"""In what precision a run computes: the dtype of its matrix products, and what fp16 needs beside it.

Weights, gradients of weights, the optimizer's averages and every sum are float32 throughout; bf16 and fp16 are what matrix products
read and write.
"""

import math
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from minimind_train.model.config import Dtype

_TF32_CAPABILITY = (8, 0)
_GROWTH_INTERVAL = 2000  # steps
_LARGEST_SCALE = 2.0**32  # so that a gradient that is zero for long does not take the scale to infinity


_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_dtype(name: Dtype, device: torch.device) -> Literal["bf16", "fp16", "fp32"]:
    """Return the dtype of the matrix products: bf16 under `auto` where the device multiplies it natively, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and _cpu_multiplies_bf16() else "fp32"


def autocast(dtype: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of a forward pass: weights stay float32, matrix products are in `dtype`."""
    return torch.autocast(device.type, dtype=_AUTOCAST.get(dtype), enabled=dtype in _AUTOCAST)


def allow_tf32(device: torch.device, *, allowed: bool) -> bool:
    """Let products of float32 matrices be computed in TF32, where a GPU has it, or forbid that; return whether they are.

    TF32 keeps the range of float32 and 10 bits of its 23 after the point. It is set for the whole process, as torch has it.
    """
    if device.type != "cuda":
        return False
    used = allowed and torch.cuda.get_device_capability(device) >= _TF32_CAPABILITY
    torch.set_float32_matmul_precision("high" if used else "highest")
    return used


@dataclass(kw_only=True)
class LossScale:
    """What a loss is multiplied by before its gradient is computed in fp16, in which small gradients would be zero.

    The rule and its numbers are those of `torch.amp.GradScaler`: a gradient that overflows halves the scale, and its step moves
    nothing; 2,000 steps in a row without one double it. Whether one did is read off the norm of the whole gradient, which a step
    computes in any case and which is the same on every rank, so nothing is looked through twice, and sharded gradients need no
    scaler of their own. Powers of two, so scaling rounds nothing.
    """

    value: float = 2.0**16
    steady_steps: int = 0
    """Steps in a row that moved the weights since the scale last changed."""
    skipped_steps: int = 0
    """Steps of the whole run that moved nothing."""

    def skips(self, loss: float, grad_norm: float) -> bool:
        """Count a step, and tell whether it must move nothing, because a smaller scale may make its gradient finite.

        It may not where the loss, which is not scaled, is not finite either, or where the scale is 1 already.
        """
        if math.isfinite(grad_norm):
            self.steady_steps += 1
            if self.steady_steps == _GROWTH_INTERVAL:
                self.value, self.steady_steps = min(2 * self.value, _LARGEST_SCALE), 0
            return False
        if not math.isfinite(loss) or self.value <= 1:
            return False
        self.value, self.steady_steps = self.value / 2, 0
        self.skipped_steps += 1
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; `LossScale(**state)` is the same again."""
        return asdict(self)


def _cpu_multiplies_bf16() -> bool:
    # Private in torch, so they may go; without them fp32 is right, if slower.
    probes = (
        getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return any(probe() for probe in probes if probe is not None)
