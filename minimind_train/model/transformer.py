"""MiniMind's language model: a stack of pre-norm transformer layers with tied embeddings.

RMSNorm in float32, rotary positions (`rotary`), grouped-query attention, SwiGLU or a mixture of experts (`moe`), an optional
norm of queries and keys. Parameters have the names that MiniMind and Hugging Face give them, so weights are exchanged
by name. The module holds parameters and nothing else: no buffers, no state between calls. Decoding keeps its state in a
`KVCache` that the caller passes in, and the load-balancing loss of experts is a return value of each layer.

Shapes: B batch, L new positions, T all positions, H hidden size, V vocabulary, D size of a head. Attention keeps the
heads in the third dimension, [B, L, heads, D], because that is how the projections lay them out in memory.

It works in float32, under bf16 autocast, and with all weights in bf16. Under autocast the residual stream stays float32
and the norms return bf16, so that the projections after a norm do not each cast the same tensor.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from minimind_train.model.config import ModelConfig
from minimind_train.model.document_attention import DocumentAttention
from minimind_train.model.moe import MLP, Mixture
from minimind_train.model.rotary import Rotary, rotary_tables, rotate

__all__ = [
    "Attention",
    "Decoder",
    "KVCache",
    "Layer",
    "MiniMind",
    "ModelConfig",
    "RMSNorm",
    "initialize",
]


class KVCache:
    """Keys and values of the positions read so far: the state of one decoding, without gradients.

    It grows by doubling, so that a short answer does not take the memory of the longest one.
    """

    def __init__(self) -> None:
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append one layer's keys and values, [B, L, heads, D], and return all so far as [B, T, heads, D].

        Every layer of a pass appends at the same position; `advance` moves it when the pass is over.
        """
        end = self.length + keys.shape[1]
        stored = self._layers.get(layer)
        if stored is None or stored[0].shape[1] < end:
            room = max(64, 1 << (end - 1).bit_length())
            grown = keys.new_empty((2, keys.shape[0], room, *keys.shape[2:]))
            if stored is not None:
                for new, old in zip(grown, stored, strict=True):
                    new[:, : self.length] = old[:, : self.length]
            stored = self._layers[layer] = (grown[0], grown[1])
        for buffer, new in zip(stored, (keys, values), strict=True):
            buffer[:, self.length : end] = new
        return stored[0][:, :end], stored[1][:, :end]

    def advance(self, num_positions: int) -> None:
        """Count the positions of a finished pass."""
        self.length += num_positions


class RMSNorm(nn.Module):
    """Root mean square normalisation, computed in float32 whatever the input's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        normed = functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        device = x.device.type
        return normed.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, size = config.hidden_size, config.head_size
        self.head_size = size
        self.dropout = config.dropout
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * size, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * size, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * size, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * size, hidden, bias=False)
        self.q_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        cache: KVCache | None,
        layer: int,
        documents: DocumentAttention | None,
    ) -> Tensor:
        """Return the attention of each position of [B, L, H] to those up to its own, in the row or in its document."""
        queries, keys, values = (
            project(x).unflatten(-1, (-1, self.head_size))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys = rotate(queries, *rotary), rotate(keys, *rotary)
        if cache is not None:
            keys, values = cache.append(layer, keys, values)
        dropout_p = self.dropout if self.training else 0.0
        if documents is None:
            mixed = self._attend(queries, keys, values, dropout_p)
        else:
            mixed = documents.attend(queries, keys, values, dropout_p)
        out: Tensor = self.o_proj(mixed.flatten(2))
        return functional.dropout(out, self.dropout, self.training)

    @staticmethod
    def _attend(queries: Tensor, keys: Tensor, values: Tensor, dropout_p: float) -> Tensor:
        num_new, num_all = queries.shape[1], keys.shape[1]
        # `is_causal` would align the first new position with the first of all; a single new one attends to all.
        mask = None
        if 1 < num_new < num_all:
            mask = queries.new_ones((num_new, num_all), dtype=torch.bool).tril(num_all - num_new)
        mixed = functional.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=mask,
            dropout_p=dropout_p,
            is_causal=num_new == num_all > 1,
            enable_gqa=queries.shape[2] != keys.shape[2],
        )
        return mixed.transpose(1, 2)


class Layer(nn.Module):
    """Attention, then an MLP or a mixture of experts, each after a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mixture(config) if config.use_moe else MLP(config.hidden_size, config.mlp_size)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        cache: KVCache | None,
        layer: int,
        documents: DocumentAttention | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the new residual stream, [B, L, H], and the imbalance of the experts, float32 [], or None for an MLP."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache, layer, documents)
        mixed: Tensor
        imbalance: Tensor | None = None
        if isinstance(self.mlp, Mixture):
            mixed, imbalance = self.mlp(self.post_attention_layernorm(x))
        else:
            mixed = self.mlp(self.post_attention_layernorm(x))
        return x + mixed, imbalance


class Decoder(nn.Module):
    """The model without its output matrix; it is a separate module only for the `model.` in the parameter names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MiniMind(nn.Module):
    """The language model. `initialize` or `load_state_dict` sets its weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [V, H]; where they are tied it is the embedding matrix."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(
        self, input_ids: Tensor, *, position_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Return the hidden states [B, L, H] after the last norm.

        Args:
            input_ids: tokens, int64 [B, L].
            position_ids: the position of each token in its document, int64 [B, L], counting up from 0, below L. A document begins
                at every 0, and a token attends only to its own document. Without it a row is one document.
            cache: the tokens read before; `input_ids` continues them and is added to the cache. It holds one document for each row, so
                it cannot be combined with `position_ids`.

        Raises:
            ValueError: the sequence is longer than the model can read, or both `cache` and `position_ids` are given.
        """
        return self._read(input_ids, position_ids, cache)[0]

    def hidden_and_balance(
        self, input_ids: Tensor, *, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the hidden states as `forward` does, and the load-balancing loss of the experts of all layers.

        This loss is float32 [], a mean over the windows times its coefficient, to be added to a mean loss over targets. It is None
        where nothing is balanced: in a dense model, with the coefficient 0, and outside of training.
        """
        hidden, imbalances = self._read(input_ids, position_ids, None)
        if not imbalances:
            return hidden, None
        return hidden, torch.stack(imbalances).sum() * self.config.router_aux_loss_coef

    def _read(
        self, input_ids: Tensor, position_ids: Tensor | None, cache: KVCache | None
    ) -> tuple[Tensor, list[Tensor]]:
        if cache is not None and position_ids is not None:
            raise ValueError("a cache holds one document for each row; leave position_ids out to continue it")
        start = 0 if cache is None else cache.length
        stop = start + input_ids.shape[1]
        if stop > self.config.longest_sequence:
            raise ValueError(
                f"a sequence of {stop} tokens is longer than max_position_embeddings, which is "
                f"{self.config.longest_sequence}"
            )
        rotary, documents = rotary_tables(start, stop, self.config, input_ids.device), None
        if position_ids is not None:
            rotary, documents = (
                (rotary[0][position_ids], rotary[1][position_ids]),
                DocumentAttention(position_ids),
            )
            documents.prepare(self._example_query(), self.config.dropout if self.training else 0.0)
        x = functional.dropout(self.model.embed_tokens(input_ids), self.config.dropout, self.training)
        imbalances = []
        for number, layer in enumerate(self.model.layers):
            x, imbalance = layer(x, rotary, cache, number, documents)
            if imbalance is not None:
                imbalances.append(imbalance)
        if cache is not None:
            cache.advance(stop - start)
        return self.model.norm(x), imbalances

    def _example_query(self) -> Tensor:
        weight = self.model.embed_tokens.weight
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        return weight.new_empty((0, self.config.head_size), dtype=dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores [..., V] of the next token for hidden states [..., H]."""
        return functional.linear(hidden, self.head_weight)


def initialize(model: MiniMind, seed: int) -> None:
    """Set every weight from `seed` alone: normal(0, 0.02) for matrices, ones for norms, as MiniMind starts.

    The numbers are drawn on the CPU in the order of the parameters, so they depend neither on the device nor on the state of
    the global generator.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.02, generator=generator))
