"""A model in the form that MiniMind's own code opens: which of its two generations can hold it, and by what options.

minimind-3 normalises queries and keys and has no shared experts; minimind2 has shared experts, as wide as its MLP, and no such norm.
Both call parameters by the names that they have here, with the output matrix written out where it is tied. This imports no torch.

Source: https://github.com/jingyaogong/minimind, model/model_minimind.py and trainer/trainer_utils.py of 2026-04 and of 2025.
"""

from dataclasses import dataclass
from typing import Any

from minimind_data.errors import UserError
from minimind_train.model.config import ModelConfig

_WEIGHT_NAMES = {"sft": "full_sft"}  # MiniMind's names of phases, where they differ from ours

_OPTIONS_OF_BOTH = (
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
_EXPERT_OPTIONS_2 = {
    "num_experts_per_tok": "num_experts_per_tok",
    "num_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "router_aux_loss_coef": "aux_loss_alpha",
    "seq_aux": "seq_aux",
    "norm_topk_prob": "norm_topk_prob",
}
_EXPERT_OPTIONS_3 = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "router_aux_loss_coef",
)
_YARN = {
    # The one way in which MiniMind scales positions.
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
    """minimind-3 or minimind2; its tokenizer ships under the same name, without a hyphen."""
    options: dict[str, Any]
    """The arguments of its `MiniMindConfig`."""

    @property
    def tokenizer(self) -> str:
        """The name of this generation's own tokenizer, which its code reads from its folder model/."""
        return self.generation.replace("-", "")

    @property
    def call(self) -> str:
        """The call that makes that configuration."""
        return f"MiniMindConfig({', '.join(f'{name}={value!r}' for name, value in self.options.items())})"


def file_name(name: str, config: ModelConfig) -> str:
    """Return the file name under which MiniMind's scripts look for weights: the phase, the width, and whether there are experts.

    Args:
        name: of our phase, or any name that `eval_llm.py` is to call them by; what it says of the width already is not repeated.
        config: the shape.
    """
    ending = f"_{config.hidden_size}{'_moe' if config.use_moe else ''}"
    return f"{_WEIGHT_NAMES.get(name, name.removesuffix('_resume').removesuffix(ending))}{ending}.pth"


def minimind_form(config: ModelConfig) -> MiniMindForm:
    """Return how MiniMind's code opens a model of this shape.

    Raises:
        UserError: neither generation of it computes what this model does; the message names the option.
    """
    config = config.resolved()
    generation = "minimind-3" if config.qk_norm else "minimind2"
    for is_there, name in _obstacles(config):
        if is_there:
            raise UserError(
                f"`to` minimind: {generation}, the generation of MiniMind "
                f"{'with' if config.qk_norm else 'without'} a norm of queries and keys, has no {name}",
                remedy="export it by `to` hf if that can hold it, or go on with the run's own checkpoints",
                option="to",
            )
    options = {name: getattr(config, name) for name in _OPTIONS_OF_BOTH}
    if config.rope_scaling.inference_rope_scaling:
        options["inference_rope_scaling"] = True
    if config.qk_norm:
        options |= {"head_dim": config.head_dim, "tie_word_embeddings": config.tie_word_embeddings}
        options |= {name: getattr(config, name) for name in _EXPERT_OPTIONS_3 if config.use_moe}
    elif config.use_moe:
        options |= {theirs: getattr(config, ours) for ours, theirs in _EXPERT_OPTIONS_2.items()}
    return MiniMindForm(generation=generation, options=options)


def _obstacles(config: ModelConfig) -> list[tuple[bool, str]]:
    """Return what this model's generation of MiniMind cannot hold, each as (whether the model has it, its name)."""
    scaling, mixture = config.rope_scaling, config.use_moe
    stretched = scaling.inference_rope_scaling
    other_yarn = [name for name, value in _YARN.items() if stretched and getattr(scaling, name) != value]
    obstacles = [
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
        # Where the ramp ends behind the last pair of a head, MiniMind ends it there and transformers does not.
        obstacles.append((True, f"YaRN like this one for heads of {config.head_size}"))
    if config.qk_norm:
        return [
            *obstacles,
            (
                mixture and config.n_shared_experts > 0,
                f"shared experts (n_shared_experts {config.n_shared_experts})",
            ),
        ]
    return [
        *obstacles,
        (not config.tie_word_embeddings, "output matrix of its own (tie_word_embeddings off)"),
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
