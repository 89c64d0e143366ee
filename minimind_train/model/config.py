"""The options of the model, and the number of parameters that follows from them. This imports no torch."""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from minimind_data.options import check_limits
from minimind_train.resume_policy import Resume

_LIMITS = {
    # Far above any model that one machine trains; whether a model fits depends on its parameters.
    "hidden_size": (1, 2**20),
    "num_hidden_layers": (1, 2**12),
    "num_attention_heads": (1, 2**16),
    "num_key_value_heads": (1, 2**16),
    "head_dim": (1, 2**20),
    "intermediate_size": (1, 2**22),
    "vocab_size": (1, 2**31),
    "max_position_embeddings": (1, 2**31),
    "num_experts": (1, 2**12),
    "num_experts_per_tok": (1, 2**12),
    "n_shared_experts": (0, 2**12),
    "moe_intermediate_size": (1, 2**22),
}

Dtype = Literal["auto", "bf16", "fp16", "fp32"]
"""The dtype of matrix products; `auto` is bf16 where the device has it natively, else fp32."""

ATTENTION_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MATRICES = ("gate_proj", "up_proj", "down_proj")
_LARGEST_RANK = 2**16


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """YaRN (https://arxiv.org/abs/2309.00071), for longer contexts than a model was trained on; the defaults are MiniMind's."""

    inference_rope_scaling: Annotated[
        bool, "Scale the rotary positions by YaRN, for contexts longer than in training."
    ] = False
    yarn_factor: Annotated[float, "YaRN: factor by which the context grows."] = 16.0
    yarn_original_max_position_embeddings: Annotated[int, "YaRN: maximum sequence length before scaling."] = (
        2048
    )
    yarn_beta_fast: Annotated[
        float, "YaRN: wavelengths with more rotations than this in the original context are not scaled."
    ] = 32.0
    yarn_beta_slow: Annotated[
        float, "YaRN: wavelengths with fewer rotations than this in the original context are scaled in full."
    ] = 1.0
    yarn_attention_factor: Annotated[
        float, "YaRN: factor on the rotated queries and keys; 1 in MiniMind, 0.1 ln(factor) + 1 in the paper."
    ] = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.yarn_factor <= 2**20:
            raise ValueError(f"`yarn_factor` must be from 1 to {2**20}, not {self.yarn_factor}")
        if not 1 <= self.yarn_original_max_position_embeddings <= 2**31:
            raise ValueError(
                "`yarn_original_max_position_embeddings` must be from 1 to 2^31, not "
                f"{self.yarn_original_max_position_embeddings}"
            )
        if not 0 < self.yarn_beta_slow <= self.yarn_beta_fast < math.inf:
            raise ValueError(
                f"`yarn_beta_slow` {self.yarn_beta_slow} must be positive and at most `yarn_beta_fast` {self.yarn_beta_fast}"
            )
        if not 0 < self.yarn_attention_factor < math.inf:
            raise ValueError(
                f"`yarn_attention_factor` must be a positive number, not {self.yarn_attention_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of the model, under MiniMind's names; the defaults are minimind-3 (64 million parameters)."""

    hidden_size: Annotated[int, "Hidden size: width of the residual stream.", Resume.SHAPE] = 768
    num_hidden_layers: Annotated[int, "Number of transformer layers.", Resume.SHAPE] = 8
    num_attention_heads: Annotated[
        int, "Number of attention heads (of queries) in each layer.", Resume.SHAPE
    ] = 8
    num_key_value_heads: Annotated[
        int,
        "Number of key and value heads; each serves a group of query heads of the same size.",
        Resume.SHAPE,
    ] = 4
    head_dim: Annotated[
        int | None, "Dimension of a head; by default hidden_size / num_attention_heads.", Resume.SHAPE
    ] = None
    intermediate_size: Annotated[
        int | None,
        "MLP width; by default hidden_size times pi, rounded up to a multiple of 64.",
        Resume.SHAPE,
    ] = None
    vocab_size: Annotated[int, "Entries of the vocabulary; the dataset sets it.", Resume.SHAPE] = field(
        default=6400, metadata={"flag": False}
    )
    max_position_embeddings: Annotated[int, "Maximum sequence length of the model, in tokens."] = 32768
    rms_norm_eps: Annotated[float, "Epsilon of RMSNorm."] = 1e-6
    rope_theta: Annotated[float, "Theta, the base of the rotary position embedding."] = 1e6
    tie_word_embeddings: Annotated[bool, "Tie the output matrix to the embedding matrix.", Resume.SHAPE] = (
        True
    )
    dropout: Annotated[float, "Dropout probability in training.", Resume.TRAINING] = 0.0
    qk_norm: Annotated[
        bool, "Normalize queries and keys before the rotary embedding, as minimind-3 does.", Resume.SHAPE
    ] = True
    use_moe: Annotated[bool, "Replace the MLP of each layer by a mixture of experts.", Resume.SHAPE] = False
    num_experts: Annotated[
        int, "Number of routed experts in each layer (n_routed_experts).", Resume.SHAPE
    ] = 4
    num_experts_per_tok: Annotated[int, "Number of routed experts for each token (top-k)."] = 1
    n_shared_experts: Annotated[
        int, "Number of shared experts, which every token goes through.", Resume.SHAPE
    ] = 0
    moe_intermediate_size: Annotated[
        int | None, "Width of an expert, routed or shared; by default intermediate_size.", Resume.SHAPE
    ] = None
    scoring_func: Annotated[
        Literal["softmax", "sigmoid"],
        "Scores of the router: softmax over the experts, or sigmoid for each, as in DeepSeek-V3.",
    ] = "softmax"
    norm_topk_prob: Annotated[bool, "Normalize the weights of a token's experts to a sum of 1."] = True
    router_aux_loss_coef: Annotated[
        float, "Weight of the load-balancing loss of the experts (aux_loss_alpha); 0 turns it off."
    ] = 5e-4
    seq_aux: Annotated[
        bool,
        "Balance the experts within each window, as in DeepSeek-V2, so that the micro-batch makes no "
        "difference; else over the micro-batch, as in minimind-3.",
    ] = True
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)

    def __post_init__(self) -> None:
        check_limits(self, _LIMITS)
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` {self.hidden_size} does not divide into {self.num_attention_heads} attention heads; "
                "change one of them, or set head_dim"
            )
        if self.head_size % 2:
            raise ValueError(f"`head_dim` must be even for the rotary positions, not {self.head_size}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` {self.num_attention_heads} must be a multiple of "
                f"`num_key_value_heads` {self.num_key_value_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be at least 0 and below 1, not {self.dropout}")
        for name in ("rms_norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, not {getattr(self, name)}")
        if self.rope_scaling.inference_rope_scaling and self.rope_theta <= 1:
            raise ValueError(
                f"`rope_theta` must be above 1 for `inference_rope_scaling`, not {self.rope_theta}"
            )
        self._check_mixture()

    def _check_mixture(self) -> None:
        if self.use_moe and self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"`num_experts_per_tok` {self.num_experts_per_tok} must be at most `num_experts` {self.num_experts}"
            )
        if not 0 <= self.router_aux_loss_coef < math.inf:
            raise ValueError(f"`router_aux_loss_coef` must be 0 or more, not {self.router_aux_loss_coef}")

    @property
    def head_size(self) -> int:
        """`head_dim`, or its default."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def mlp_size(self) -> int:
        """`intermediate_size`, or its default."""
        if self.intermediate_size is None:
            return math.ceil(self.hidden_size * math.pi / 64) * 64
        return self.intermediate_size

    @property
    def expert_size(self) -> int:
        """`moe_intermediate_size`, or its default."""
        return self.mlp_size if self.moe_intermediate_size is None else self.moe_intermediate_size

    @property
    def yarn_ramp(self) -> tuple[int, int]:
        """The pairs of a head between which YaRN changes from no scaling to full scaling; rounded as in transformers."""

        def pair_that_rotates(times: float) -> float:
            length = self.rope_scaling.yarn_original_max_position_embeddings / (2 * math.pi * times)
            return self.head_size * math.log(length) / (2 * math.log(self.rope_theta))

        low = max(math.floor(pair_that_rotates(self.rope_scaling.yarn_beta_fast)), 0)
        return low, min(math.ceil(pair_that_rotates(self.rope_scaling.yarn_beta_slow)), self.head_size - 1)

    @property
    def longest_sequence(self) -> int:
        """Tokens that a sequence may have: `max_position_embeddings`, or the context that YaRN extends to, if that is longer."""
        scaling = self.rope_scaling
        if not scaling.inference_rope_scaling:
            return self.max_position_embeddings
        stretched = int(scaling.yarn_factor * scaling.yarn_original_max_position_embeddings)
        return max(self.max_position_embeddings, stretched)

    @property
    def balances_experts(self) -> bool:
        """Whether there is a load-balancing loss, which counts every position, PAD too."""
        return self.use_moe and self.router_aux_loss_coef > 0

    @property
    def balances_micro_batches(self) -> bool:
        """Whether the result of training depends on how a batch is divided into micro-batches."""
        return self.balances_experts and not self.seq_aux

    @property
    def num_parameters(self) -> int:
        """The number of weights of the model, shared ones once."""
        return self._count_parameters(self.num_experts)

    @property
    def num_active_parameters(self) -> int:
        """The number of weights that one token uses: all but those of the experts that it is not sent to."""
        return self._count_parameters(self.num_experts_per_tok)

    def _count_parameters(self, num_experts: int) -> int:
        """Count the weights with this number of routed experts in each layer."""
        hidden, head = self.hidden_size, self.head_size
        attention = 2 * hidden * head * (self.num_attention_heads + self.num_key_value_heads)
        norms = 2 * hidden + (2 * head if self.qk_norm else 0)
        mlp = 3 * hidden * self.mlp_size
        if self.use_moe:
            router = hidden * self.num_experts
            mlp = router + 3 * hidden * self.expert_size * (num_experts + self.n_shared_experts)
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * (attention + mlp + norms) + hidden

    def resolved(self) -> "ModelConfig":
        """The same shape with every default filled in, for the record of a run and for other programs."""
        return replace(
            self,
            head_dim=self.head_size,
            intermediate_size=self.mlp_size,
            moe_intermediate_size=self.expert_size,
        )


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Whether adapters are trained instead of all weights; the default targets and scale are MiniMind's."""

    lora_rank: Annotated[
        int,
        "LoRA rank: train adapters beside the frozen weights of `from_weight`; 0 trains all weights. "
        "MiniMind uses 16, with `learning_rate` 1e-4.",
        Resume.SHAPE,
    ] = 0
    lora_alpha: Annotated[
        float | None, "LoRA alpha: adapters are scaled by alpha / rank; by default the rank.", Resume.SHAPE
    ] = None
    lora_targets: Annotated[
        str,
        f"LoRA targets, separated by commas: {', '.join((*ATTENTION_MATRICES, *MLP_MATRICES))}; or all.",
        Resume.SHAPE,
    ] = "q_proj,o_proj"

    def __post_init__(self) -> None:
        if not 0 <= self.lora_rank <= _LARGEST_RANK:
            raise ValueError(f"`lora_rank` must be from 0 to {_LARGEST_RANK}, not {self.lora_rank}")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < float("inf"):
            raise ValueError(f"`lora_alpha` must be a positive number, not {self.lora_alpha}")
        if unknown := sorted({*self.targets} - {*ATTENTION_MATRICES, *MLP_MATRICES}):
            raise ValueError(
                f"lora_targets has {unknown[0]!r}; the matrices are {', '.join((*ATTENTION_MATRICES, *MLP_MATRICES))}, or all"
            )

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of the matrices that get an adapter."""
        if self.lora_targets == "all":
            return (*ATTENTION_MATRICES, *MLP_MATRICES)
        return tuple(name.strip() for name in self.lora_targets.split(","))

    def refuse_unfit(self, model: ModelConfig) -> None:
        """Refuse adapters for matrices that cannot have one in this model.

        Raises:
            ValueError: the message says which.
        """
        if self.lora_rank and model.use_moe and (experts := sorted(set(self.targets) & set(MLP_MATRICES))):
            raise ValueError(
                f"lora_targets has {experts[0]}, and experts get no adapters; take some of {', '.join(ATTENTION_MATRICES)}"
            )

    @property
    def alpha(self) -> float:
        """`lora_alpha`, or its default."""
        return float(self.lora_rank) if self.lora_alpha is None else self.lora_alpha

    @property
    def scale(self) -> float:
        """The factor of an adapter's product."""
        return self.alpha / self.lora_rank


def trained_parameters(model: ModelConfig, lora: LoraConfig) -> int:
    """Return how many weights are trained, all or those of the adapters; of these a lower bound, as one side is as wide as the model."""
    if not lora.lora_rank:
        return model.num_parameters
    return lora.lora_rank * model.hidden_size * model.num_hidden_layers * len(set(lora.targets))


def parameter_line(config: ModelConfig) -> str:
    """Return the line that MiniMind prints of a model: all its weights and, of a mixture of experts, the active ones."""
    total, active = config.num_parameters, config.num_active_parameters
    line = f"Model Params: {total / 1e6:.2f}M"
    return f"{line}-A{active / 1e6:.2f}M" if active < total else line
