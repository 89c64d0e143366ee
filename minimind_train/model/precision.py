"""The precision in which a run computes: the dtype of its matrix products, and the loss scale that fp16 needs.

Weights, gradients of weights, the optimizer's averages and all sums are float32; only matrix products read and write bf16 or
fp16.
"""

import math
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch

from minimind_data.json_fields import Count, FieldError, Rule, read_fields
from minimind_train.model.config import Dtype

_TF32_CAPABILITY = (8, 0)
_GROWTH_INTERVAL = 2000  # steps
_LARGEST_SCALE = 2.0**32  # so that a gradient that stays zero does not let the scale grow to infinity

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_dtype(name: Dtype, device: torch.device) -> Literal["bf16", "fp16", "fp32"]:
    """Return the dtype of the matrix products; `auto` is bf16 where the device multiplies it natively, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and _cpu_multiplies_bf16() else "fp32"


def autocast(dtype: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context for a forward pass in which weights stay float32 and matrix products are in `dtype`."""
    return torch.autocast(device.type, dtype=_AUTOCAST.get(dtype), enabled=dtype in _AUTOCAST)


def allow_tf32(device: torch.device, *, allowed: bool) -> bool:
    """Compute products of float32 matrices in TF32 where the GPU has it, or forbid that; return whether TF32 is used.

    TF32 has the range of float32 and 10 of the 23 bits of its mantissa. torch sets it for the whole process.
    """
    if device.type != "cuda":
        return False
    used = allowed and torch.cuda.get_device_capability(device) >= _TF32_CAPABILITY
    torch.set_float32_matmul_precision("high" if used else "highest")
    return used


@dataclass(kw_only=True)
class LossScale:
    """The factor of the loss in fp16, without which small gradients would be rounded to zero.

    The rule and its numbers are those of `torch.amp.GradScaler`: a gradient that overflows halves the scale, and its step changes no
    weight; after 2,000 steps in a row without overflow the scale is doubled. Overflow shows in the norm of the whole gradient, which a
    step computes anyway and which is the same on every rank, so gradients are not read twice, and sharded gradients need no
    scaler of their own. The scale is a power of two, so that scaling does not round.
    """

    value: Annotated[float, Rule("more than 0", lambda value: value > 0)] = 2.0**16
    steady_steps: Count = 0
    """Steps without overflow since the scale last changed."""
    skipped_steps: Count = 0
    """Steps of the whole run that changed no weight."""

    def skips(self, loss: float, grad_norm: float) -> bool:
        """Count a step, and tell whether to skip it, because a smaller scale may make its gradient finite.

        A smaller scale does not help where the loss, which is not scaled, is not finite either, or where the scale is 1 already.
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
        """Return the state for a checkpoint; `LossScale(**state)` restores it."""
        return asdict(self)

    @classmethod
    def is_state(cls, state: dict[str, Any]) -> bool:
        """Tell whether `state` is what `state_dict` returns."""
        try:
            read_fields(cls, state)
        except FieldError:
            return False
        return True


def _cpu_multiplies_bf16() -> bool:
    # These are private in torch and may disappear; then fp32 is used, which is right, if slower.
    probes = (
        getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return any(probe() for probe in probes if probe is not None)
