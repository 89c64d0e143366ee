"""Attention inside documents, for windows that hold several documents each.

There are three ways to compute the same numbers, up to rounding. Which one is taken depends on the device:

- CPU, windows of more than 512 tokens: each document by itself, one causal attention after the other, so that nothing is computed
  that a mask would discard. Forward and backward for windows of 2,048 tokens with documents of about 170 took 0.35 (fp32) to
  0.65 (bf16) of the time of one causal attention over each window, and a mask 1.8 times that time. `flex_attention` has no
  backward pass on the CPU (torch 2.13).
- CUDA, in bf16 or fp16: `torch.nn.attention.varlen`, the flash kernel for sequences of different lengths, where this torch has it
  with groups of query heads (2.13 has), and where there is no dropout, which it does not support.
- otherwise: a mask [B, 1, L, L]. On the CPU, at up to 512 tokens, it takes about as long as causal attention over the window, and
  up to half as long as the documents one by one.

Rotary scores depend only on distances. So it makes no difference but rounding, at large positions, whether positions start again
with each document; that is decided by the model, not here.

Shapes: B windows, L positions, S documents in them, D size of a head; PAD counts as documents.
"""

import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_LONGEST_MASKED = 512
_FLASH_CAPABILITY = (8, 0)
_FLASH_HEAD_SIZES = range(8, 257, 8)


class DocumentAttention:
    """Attention inside the documents of one batch; made once, used by all layers of a forward pass.

    Args:
        position_ids: the position of each token in its document, int64 [B, L]; a document begins at every 0, and with every window.
    """

    def __init__(self, position_ids: Tensor) -> None:
        self.begins = position_ids == 0
        self.begins[:, 0] = True  # so that no document reaches from one window into the next

    @cached_property
    def starts(self) -> Tensor:
        """The first token of each document, counted over all windows, and at the end the number of tokens: int64 [S + 1]."""
        starts = self.begins.flatten().nonzero().squeeze(1)
        return functional.pad(starts, (0, 1), value=self.begins.numel())

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        lengths: list[int] = self.starts.diff().tolist()
        return lengths

    @cached_property
    def mask(self) -> Tensor:
        """Whether a position (row) attends to another (column): bool [B, 1, L, L]."""
        number = self.begins.cumsum(1)
        return (number[:, None, :, None] == number[:, None, None, :]).tril()

    @classmethod
    def stay_out_of_graphs(cls) -> None:
        """Keep the part that depends on the lengths of documents, which differ in each batch, out of what torch compiles."""
        cls._one_by_one = torch.compiler.disable(cls._one_by_one)  # type: ignore[method-assign, no-untyped-call]

    def prepare(self, example: Tensor, dropout_p: float = 0.0) -> None:
        """Compute now what `attend` needs for queries such as this one, [..., D]; compiled layers cannot do it."""
        if self._takes_one_by_one(example.device):
            _ = self.lengths
        elif dropout_p == 0 and flash_kernel(example) is not None:
            _ = self.starts
        else:
            _ = self.mask

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, dropout_p: float = 0.0) -> Tensor:
        """Return the attention of each position to those of its document up to its own.

        Args:
            queries: [B, L, heads, D].
            keys: [B, L, key and value heads, D]; each head serves a group of query heads of the same size.
            values: likewise.
            dropout_p: the probability of dropping an attention weight.

        Returns:
            [B, L, heads, D].
        """
        if self._takes_one_by_one(queries.device):
            return self._one_by_one(queries, keys, values, dropout_p)
        kernel = flash_kernel(queries) if dropout_p == 0 else None
        if kernel is not None:
            return self._flash(kernel, queries, keys, values)
        return self._masked(queries, keys, values, dropout_p)

    def _takes_one_by_one(self, device: torch.device) -> bool:
        return device.type == "cpu" and self.begins.shape[1] > _LONGEST_MASKED

    def _one_by_one(self, queries: Tensor, keys: Tensor, values: Tensor, dropout_p: float) -> Tensor:
        split = (torch.split(x.flatten(0, 1), self.lengths) for x in (queries, keys, values))
        mixed = [
            functional.scaled_dot_product_attention(
                query.transpose(0, 1)[None],
                key.transpose(0, 1)[None],
                value.transpose(0, 1)[None],
                dropout_p=dropout_p,
                is_causal=True,
                enable_gqa=queries.shape[2] != keys.shape[2],
            )[0].transpose(0, 1)
            for query, key, value in zip(*split, strict=True)
        ]
        return torch.cat(mixed).view_as(queries)

    def _masked(self, queries: Tensor, keys: Tensor, values: Tensor, dropout_p: float) -> Tensor:
        mixed = functional.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=self.mask,
            dropout_p=dropout_p,
            enable_gqa=queries.shape[2] != keys.shape[2],
        )
        return mixed.transpose(1, 2)

    def _flash(self, kernel: Callable[..., Tensor], queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        starts = self.starts.int()
        longest = queries.shape[1]  # an upper bound: reading the true length would wait for the device
        mixed = kernel(
            *(x.flatten(0, 1) for x in (queries, keys, values)),
            starts,
            starts,
            longest,
            longest,
            window_size=(-1, 0),  # causal
            enable_gqa=queries.shape[2] != keys.shape[2],
        )
        return mixed.view_as(queries)


def flash_kernel(queries: Tensor) -> Callable[..., Tensor] | None:
    """Return the kernel for sequences of different lengths, or None where it does not support such queries, [..., D], on their device."""
    fits = (
        queries.device.type == "cuda"
        and torch.version.hip is None
        and queries.dtype in {torch.bfloat16, torch.float16}
        and queries.shape[-1] in _FLASH_HEAD_SIZES
        and torch.cuda.get_device_capability(queries.device) >= _FLASH_CAPABILITY
    )
    return _varlen_attention() if fits else None


_VARLEN: list[Callable[..., Any] | None] = []
"""The result of `_varlen_attention`; not a cache of functools, because compiled layers warn about these."""


def _varlen_attention() -> Callable[..., Any] | None:
    """Return torch's `varlen_attn`, or None where torch is older and has none, or one without groups of heads."""
    if not _VARLEN:
        try:
            from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 - older torch does not have it
        except ImportError:
            _VARLEN.append(None)
        else:
            needed = {"window_size", "enable_gqa"}
            fits = needed <= inspect.signature(varlen_attn).parameters.keys()
            _VARLEN.append(varlen_attn if fits else None)
    return _VARLEN[0]
