"""The shape of the model in a file of weights, as far as its tensors tell it: for MiniMind's `.pth`, which say nothing else.

Matrices tell widths, layers, experts and key and value heads; a norm of queries and keys tells minimind-3 from minimind2, and how wide a head
is. The rest is taken to be as MiniMind has it: without that norm its 8 heads, and one expert for each token of minimind-3, two of minimind2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind_data.errors import UserError
from minimind_data.options import options_from
from minimind_train.model.config import ModelConfig
from minimind_train.model.presets import PRESETS
from minimind_train.weights.foreign import EMBEDDING_NAME, HEAD_NAME, num_entries

__all__ = ["FileShape", "shape_of_file"]

_LAYERS = "model.layers."
_SHOWN = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_SHOWN_OF_EXPERTS = ("num_experts", "num_experts_per_tok", "n_shared_experts")


@dataclass(frozen=True, kw_only=True)
class FileShape:
    """What a file of weights was taken for."""

    config: ModelConfig
    generation: str
    """minimind-3 or minimind2."""
    assumed: tuple[str, ...]
    """Options of which its tensors say nothing and the caller neither."""

    @property
    def tokenizer(self) -> str:
        """The name of MiniMind's tokenizer of this generation."""
        return self.generation.replace("-", "")

    @property
    def in_words(self) -> str:
        """A clause with the shape, for people."""
        names = (*_SHOWN, *(_SHOWN_OF_EXPERTS if self.config.use_moe else ()))
        sizes = ", ".join(
            f"{name} {getattr(self.config, name)}{' (assumed)' if name in self.assumed else ''}"
            for name in names
        )
        return f"{self.generation} by its tensors, {sizes}"


def shape_of_file(tensors: Mapping[str, Tensor], options: Mapping[str, Any], source: Path) -> FileShape:
    """Return the shape of the model whose parameters these are.

    Args:
        tensors: by our names, experts each for itself.
        options: of the model, by name, that the caller knows; they go before what the tensors tell.
        source: where they come from, for the error.

    Raises:
        UserError: they are no model of MiniMind's, or the options that are missing cannot be told.
    """
    vocab_size = num_entries(tensors, source)
    hidden_size = tensors[EMBEDDING_NAME].shape[1]
    layers = {name.split(".")[2] for name in tensors if name.startswith(_LAYERS)}
    first = {
        name.removeprefix(f"{_LAYERS}0."): list(tensor.shape)
        for name, tensor in tensors.items()
        if name.startswith(f"{_LAYERS}0.")
    }
    qk_norm = "self_attn.q_norm.weight" in first
    generation = "minimind-3" if qk_norm else "minimind2"
    known: dict[str, Any] = {
        **{name: PRESETS[generation][name] for name in ("rms_norm_eps", "qk_norm")},
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": len(layers),
        "tie_word_embeddings": HEAD_NAME not in tensors
        or torch.equal(tensors[HEAD_NAME], tensors[EMBEDDING_NAME]),
    }
    queries, keys = _rows("self_attn.q_proj", first, source), _rows("self_attn.k_proj", first, source)
    assumed = []
    if qk_norm:
        head_size = max([1, *first["self_attn.q_norm.weight"]])
    elif "head_dim" in options:
        head_size = max(1, int(options["head_dim"]))
    else:
        if "num_attention_heads" not in options:
            assumed.append("num_attention_heads")
        heads = int(options.get("num_attention_heads", PRESETS[generation]["num_attention_heads"]))
        if heads < 1 or queries % heads or keys % max(1, queries // heads):
            raise UserError(
                f"its matrix of queries has {queries} rows and that of keys {keys}, which are no heads of {heads} each",
                where=source,
                remedy="pass its `num_attention_heads`",
                option="num_attention_heads",
            )
        head_size = queries // heads
    known |= {
        "head_dim": head_size,
        "num_attention_heads": queries // head_size,
        "num_key_value_heads": keys // head_size,
    }
    known |= _mlp(first, source)
    if known["use_moe"] and "num_experts_per_tok" not in options:
        assumed.append("num_experts_per_tok")
        known["num_experts_per_tok"] = min(1 if qk_norm else 2, known["num_experts"])
    try:
        config = options_from(ModelConfig, {**known, **options})
    except ValueError as error:
        raise UserError(
            f"its tensors are no model of MiniMind's with these options: {error}", where=source
        ) from None
    return FileShape(config=config, generation=generation, assumed=tuple(assumed))


def _mlp(first: Mapping[str, list[int]], source: Path) -> dict[str, Any]:
    """Return the options of the MLP or the experts, from the shapes in the first layer."""
    experts = {name.split(".")[2] for name in first if name.startswith("mlp.experts.")}
    if not experts:
        return {"use_moe": False, "intermediate_size": _rows("mlp.gate_proj", first, source)}
    width = _rows("mlp.experts.0.gate_proj", first, source)
    return {
        "use_moe": True,
        "num_experts": len(experts),
        "n_shared_experts": len(
            {name.split(".")[2] for name in first if name.startswith("mlp.shared_experts.")}
        ),
        "intermediate_size": width,
        "moe_intermediate_size": width,
    }


def _rows(name: str, first: Mapping[str, list[int]], source: Path) -> int:
    """Return the height of a matrix of the first layer."""
    shape = first.get(f"{name}.weight", [])
    if len(shape) != 2:
        raise UserError(
            f"has no matrix {_LAYERS}0.{name}.weight, so it holds no model of MiniMind's since minimind2",
            where=source,
        )
    return shape[0]
