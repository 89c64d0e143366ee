"""Adapters in the form that `peft` opens: adapter_config.json and adapter_model.safetensors, for a transformers model as their base.

A matrix has the same name there as here after the prefix `base_model.model.`; its adapter is `lora_A.weight` and
`lora_B.weight` (peft, utils/save_and_load.py: `get_peft_model_state_dict`).
"""

from typing import Any

from torch import Tensor

from minimind_train.model.config import LoraConfig
from minimind_train.model.lora import adapters_of
from minimind_train.model.transformer import MiniMind

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"

_PREFIX = "base_model.model."


def adapter_config(lora: LoraConfig, base: str) -> dict[str, Any]:
    """Return the contents of adapter_config.json.

    Args:
        lora: the options of the adapters.
        base: the folder of the transformers model that they belong to; `PeftModel.from_pretrained` takes another one too.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.lora_rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def adapter_tensors(model: MiniMind) -> dict[str, Tensor]:
    """Return the adapters of a model by peft's names."""
    tensors: dict[str, Tensor] = {}
    for name, matrix in adapters_of(model).items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = matrix.lora_A.detach()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = matrix.lora_B.detach()
    return tensors
