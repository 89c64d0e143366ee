"""The published sizes of MiniMind, by the option names of `ModelConfig`.

Options that a preset does not name keep their defaults. The size of the vocabulary is not among them: the dataset sets it. Source:
MiniMind's table of models, and the defaults of its code at the time of each.
"""

from typing import Any

_MINIMIND2: dict[str, Any] = {
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "qk_norm": False,
}

_MINIMIND3: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "qk_norm": True,
}

PRESETS: dict[str, dict[str, Any]] = {
    "minimind-3": _MINIMIND3,
    "minimind-3-moe": {
        **_MINIMIND3,
        "use_moe": True,
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "router_aux_loss_coef": 5e-4,
    },
    # Their MLP is 8/3 of the width, rounded up to a multiple of 64.
    "minimind2-small": {**_MINIMIND2, "hidden_size": 512, "intermediate_size": 1408},
    "minimind2": {**_MINIMIND2, "hidden_size": 768, "num_hidden_layers": 16, "intermediate_size": 2048},
    "minimind2-moe": {
        **_MINIMIND2,
        "hidden_size": 640,
        "intermediate_size": 1728,
        "use_moe": True,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "router_aux_loss_coef": 0.01,
    },
}
