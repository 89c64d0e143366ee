"""A model in the form that MiniMind's own code opens: which of its two generations can hold it, and by what options.

minimind-3 norms queries and keys and has no shared experts; minimind2 has shared experts, as wide as its MLP, and no norm. Both know
parameters by the names that they have here, with the output matrix written out where it is tied. Imports no torch.

Source: https://github.com/jingyaogong/minimind, model/model_minimind.py and trainer/trainer_utils.py of 2026-04 and of 2025.
"""

from dataclasses import dataclass
from typing import Any

from minimind_data.errors import UserError
from minimind_train.model.config import ModelConfig

_WEIGHT_NAMES = {"sft": "full_sft"}  # what MiniMind calls a phase where it is not as here

_BOTH = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
    "vocab_size",
    "rms_norm_eps",
    "rope_theta",
    "use_moe",
)
_OF_MINIMIND2 = {
    "num_experts_per_tok": "num_experts_per_tok",
    "num_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "router_aux_loss_coef": "aux_loss_alpha",
    "seq_aux": "seq_aux",
    "norm_topk_prob": "norm_topk_prob",
}
_OF_MINIMIND3 = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "router_aux_loss_coef",
)
_YARN = {
    # MiniMind stretches positions in one way only.
    "yarn_factor": 16,
    "yarn_original_max_position_embeddings": 2048,
    "yarn_beta_fast": 32,
    "yarn_beta_slow": 1,
    "yarn_attention_factor": 1,
}


@dataclass(frozen=True, kw_only=True)
class MiniMindForm:
    """How MiniMind's code opens a model."""

    generation: str
    """minimind-3 or minimind2."""
    options: dict[str, Any]
    """What its `MiniMindConfig` is to be made with."""

    @property
    def call(self) -> str:
        """The call that makes that configuration."""
        return f"MiniMindConfig({', '.join(f'{name}={value!r}' for name, value in self.options.items())})"


def file_name(command: str, config: ModelConfig) -> str:
    """Return the name by which MiniMind's scripts look for weights: what made them, their width, and whether they are a mixture."""
    suffix = "_moe" if config.use_moe else ""
    return f"{_WEIGHT_NAMES.get(command, command)}_{config.hidden_size}{suffix}.pth"


def minimind_form(config: ModelConfig) -> MiniMindForm:
    """Return how MiniMind's code opens a model of this shape.

    Raises:
        UserError: neither generation of it computes what this model does; the message names the option.
    """
    config = config.resolved()
    generation = "minimind-3" if config.qk_norm else "minimind2"
    for unfit, named in _obstacles(config):
        if unfit:
            raise UserError(
                f"--to minimind: {generation}, the generation of MiniMind {'with' if config.qk_norm else 'without'} a norm of queries "
                f"and keys, has no {named}; export it by --to hf if that can hold it, or go on with the run's own checkpoints"
            )
    options = {name: getattr(config, name) for name in _BOTH}
    if config.rope_scaling.inference_rope_scaling:
        options["inference_rope_scaling"] = True
    if config.qk_norm:
        options |= {"head_dim": config.head_dim, "tie_word_embeddings": config.tie_word_embeddings}
        options |= {name: getattr(config, name) for name in _OF_MINIMIND3 if config.use_moe}
    elif config.use_moe:
        options |= {theirs: getattr(config, ours) for ours, theirs in _OF_MINIMIND2.items()}
    return MiniMindForm(generation=generation, options=options)


def _obstacles(config: ModelConfig) -> list[tuple[bool, str]]:
    """Return what the generation that comes into question cannot hold: whether it is there, and what it is called."""
    scaling, mixture = config.rope_scaling, config.use_moe
    stretched = scaling.inference_rope_scaling
    other_yarn = [name for name, value in _YARN.items() if stretched and getattr(scaling, name) != value]
    found = [
        (
            mixture and config.scoring_func != "softmax",
            f"other router than softmax (scoring_func {config.scoring_func})",
        ),
        (bool(other_yarn), f"other YaRN than its own ({', '.join(other_yarn)})"),
        (
            stretched and config.max_position_embeddings <= scaling.yarn_original_max_position_embeddings,
            f"YaRN for a model of max_position_embeddings {config.max_position_embeddings}",
        ),
    ]
    if stretched and config.yarn_ramp[1] > config.head_size // 2 - 1:
        # Where the ramp ends behind the last pair of a head, MiniMind cuts it there, and transformers does not.
        found.append((True, f"YaRN like this one for heads of {config.head_size}"))
    if config.qk_norm:
        return [
            *found,
            (
                mixture and config.n_shared_experts > 0,
                f"shared experts (n_shared_experts {config.n_shared_experts})",
            ),
        ]
    return [
        *found,
        (not config.tie_word_embeddings, "output matrix of its own (--no-tie-word-embeddings)"),
        (
            config.head_size * config.num_attention_heads != config.hidden_size,
            f"head_dim of its own ({config.head_size})",
        ),
        (
            mixture and config.expert_size != config.mlp_size,
            f"moe_intermediate_size of its own ({config.expert_size}; intermediate_size is {config.mlp_size})",
        ),
        (
            mixture and config.norm_topk_prob and config.num_experts_per_tok == 1,
            "norm_topk_prob with num_experts_per_tok 1",
        ),
    ]
