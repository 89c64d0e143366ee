"""The shape of a model as Hugging Face writes it: `ModelConfig` to the config.json of Llama, Qwen3 or Qwen3-MoE, and back.

Without a norm of queries and keys the model is a Llama, with it a Qwen3, and with experts a Qwen3-MoE. What the class there cannot
compute is refused by name, in both directions, so that every model that is translated gives the same logits. This imports neither torch
nor transformers. config.json is written with the keys of transformers 4, which transformers 5 reads as well.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from minimind_data.dataset.format import TokenizerInfo
from minimind_data.errors import UserError
from minimind_data.json_fields import read_fields, shown
from minimind_train.model.config import ModelConfig, RopeScaling

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_MINIMIND = "minimind"  # MiniMind's own class, whose code lies beside its weights

_SAME_NAMES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)
_EXPERT_OPTIONS = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "router_aux_loss_coef",
)
_FRACTIONS = ("rms_norm_eps", "rope_theta", "router_aux_loss_coef")
"""Options that transformers 5 refuses where they are written as whole numbers."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    # What transformers takes for keys that config.json leaves out; sizes, which everybody writes, are not among them.
    "llama": {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False},
    "qwen3": {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False, "head_dim": 128},
    "qwen3_moe": {
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 1e-3,
    },
    _MINIMIND: {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "tie_word_embeddings": True},
}

_ONLY_VALUES = {
    # For each key, the values with which these classes compute what our model does; so they do where the key is absent.
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (),
}


def to_hf(config: ModelConfig, tokenizer: TokenizerInfo, dtype: str) -> dict[str, Any]:
    """Return the config.json of a model.

    Args:
        config: its shape.
        tokenizer: the one whose special tokens it names.
        dtype: of the weights, by torch's name: float32, …

    Raises:
        UserError: no class there computes what this model does.
    """
    kind = _kind_of(config)
    config_json: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **{name: getattr(config.resolved(), name) for name in _SAME_NAMES},
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "rope_theta": config.rope_theta,
        "rope_scaling": _yarn(config.rope_scaling),
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if kind == "llama":
        config_json["mlp_bias"] = False
    else:
        config_json |= {"use_sliding_window": False, "sliding_window": None}
    if kind == "qwen3_moe":
        config_json |= {name: getattr(config.resolved(), name) for name in _EXPERT_OPTIONS}
        config_json |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    return config_json | {name: float(config_json[name]) for name in _FRACTIONS if name in config_json}


def _kind_of(config: ModelConfig) -> str:
    """Return the model type that computes what this model does."""
    if not config.use_moe:
        kind = "qwen3" if config.qk_norm else "llama"
    else:
        kind = "qwen3_moe"
        if not config.qk_norm:
            _refuse("experts without a norm of queries and keys", "use_moe with qk_norm off", kind)
        if config.n_shared_experts:
            _refuse("shared experts", f"n_shared_experts {config.n_shared_experts}", kind)
        if config.scoring_func != "softmax":
            _refuse("a router other than softmax", f"scoring_func {config.scoring_func}", kind)
    if kind == "llama" and config.hidden_size % config.num_attention_heads:
        _refuse(
            "a width that does not divide into its heads",
            f"hidden_size {config.hidden_size} with num_attention_heads {config.num_attention_heads}",
            kind,
        )
    return kind


def _refuse(what: str, name: str, kind: str) -> None:
    raise UserError(
        f"`to` hf: {ARCHITECTURES[kind]} cannot hold {what} ({name}), and no other class that is "
        "known here can",
        remedy="export it by `to` minimind if that can, or go on with the run's own checkpoints",
        option="to",
    )


def _yarn(scaling: RopeScaling) -> dict[str, Any] | None:
    if not scaling.inference_rope_scaling:
        return None
    return {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": float(scaling.yarn_factor),
        "original_max_position_embeddings": scaling.yarn_original_max_position_embeddings,
        "beta_fast": float(scaling.yarn_beta_fast),
        "beta_slow": float(scaling.yarn_beta_slow),
        "attention_factor": float(scaling.yarn_attention_factor),
    }


def from_hf(config_json: Mapping[str, Any], source: str) -> ModelConfig:
    """Return the shape that a config.json describes.

    Args:
        config_json: its contents.
        source: its name, for the error.

    Raises:
        UserError: the model is of another kind, or computes what ours does not.
    """
    kind = config_json.get("model_type")
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        architectures = ", ".join((*ARCHITECTURES, _MINIMIND))
        raise UserError(
            f"a model of the type {shown(kind)}",
            where=source,
            remedy=f"the types that can be read are {architectures}",
        )
    for key, values in _ONLY_VALUES.items():
        if config_json.get(key) is not None and config_json[key] not in values:
            raise UserError(
                f"{key} {shown(config_json[key])} is not something that this model computes", where=source
            )
    config_json = _DEFAULTS[kind] | {name: value for name, value in config_json.items() if value is not None}
    try:
        return _shape(kind, config_json, source)
    except KeyError as error:
        raise UserError(f"says nothing of {error.args[0]}", where=source) from None
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(str(error), where=source) from None


def _shape(kind: str, config_json: Mapping[str, Any], source: str) -> ModelConfig:
    options = {name: config_json[name] for name in _SAME_NAMES if name != "num_key_value_heads"}
    options["num_key_value_heads"] = config_json.get(
        "num_key_value_heads", config_json["num_attention_heads"]
    )
    options["head_dim"] = config_json.get("head_dim")
    rope = config_json.get("rope_parameters") or config_json.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters is {shown(rope)}, where an object is wanted")  # noqa: TRY004 - as all that is wrong here
    options["rope_theta"] = float(rope.get("rope_theta", config_json["rope_theta"]))
    options["rope_scaling"] = asdict(_scaling(rope, config_json["max_position_embeddings"], source))
    options["qk_norm"] = kind != "llama"
    if kind == "qwen3_moe":
        options |= {name: config_json[name] for name in _EXPERT_OPTIONS if name != "num_experts"}
        options |= {
            "use_moe": True,
            "num_experts": config_json.get("num_experts", config_json.get("num_local_experts")),
        }
        if options["num_experts"] is None:
            raise KeyError("num_experts")
    elif kind == _MINIMIND:
        options |= _minimind_options(config_json)
    return read_fields(ModelConfig, options)


def _minimind_options(config_json: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that only MiniMind's own class has: minimind-3 has a `head_dim` and norms, minimind2 has neither."""
    options: dict[str, Any] = {
        "qk_norm": "head_dim" in config_json,
        "dropout": config_json.get("dropout", 0.0),
    }
    if config_json.get("use_moe"):
        names = (*_EXPERT_OPTIONS, "n_shared_experts", "scoring_func", "seq_aux")
        options |= {"use_moe": True} | {name: config_json[name] for name in names if name in config_json}
        for theirs, ours in (
            ("n_routed_experts", "num_experts"),
            ("aux_loss_alpha", "router_aux_loss_coef"),
        ):
            if theirs in config_json:
                options[ours] = config_json[theirs]
    return options


def _scaling(rope: Mapping[str, Any], longest: int, source: str) -> RopeScaling:
    """Return how positions are scaled, which a config.json calls `rope_scaling` or `rope_parameters`."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return RopeScaling()
    if kind != "yarn" or not rope.get("truncate", True):
        raise UserError(
            f"positions are stretched by {kind!r}{'' if rope.get('truncate', True) else ' without truncate'}; "
            "of these ways only yarn can be taken over",
            where=source,
        )
    original = rope.get("original_max_position_embeddings") or longest
    factor = float(rope.get("factor") or longest / original)
    return RopeScaling(
        inference_rope_scaling=True,
        yarn_factor=factor,
        yarn_original_max_position_embeddings=original,
        yarn_beta_fast=float(rope.get("beta_fast") or 32),
        yarn_beta_slow=float(rope.get("beta_slow") or 1),
        yarn_attention_factor=_attention_factor(rope, factor),
    )


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """Return the scale of queries and keys; where none is written it is the paper's."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    over, under = float(rope.get("mscale") or 0), float(rope.get("mscale_all_dim") or 0)
    if over and under:
        return (0.1 * over * math.log(factor) + 1) / (0.1 * under * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1
