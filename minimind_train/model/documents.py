"""Attention inside documents: what a batch of windows with several documents each is read by.

There are three ways to the same numbers, up to rounding. Which one is taken depends on the device:

- CPU, windows of more than 512 tokens: each document by itself, one causal attention after the other, so that nothing is computed
  that a mask would throw away. Forward and backward for windows of 2,048 tokens with documents of about 170 took 0.35 (fp32) to
  0.65 (bf16) of the time of one causal attention over each window, and a mask 1.8 times that time. `flex_attention` has no
  backward pass on the CPU (torch 2.13).
- CUDA, in bf16 or fp16: `torch.nn.attention.varlen`, the flash kernel for sequences of different lengths, where this torch has it
  with groups of query heads (2.13 has), and there is no dropout, which it does not know.
- otherwise: a mask [B, 1, L, L]. On the CPU, at up to 512 tokens, it takes about as long as causal attention over the window, and
  up to a half less than the documents one by one.

Rotary scores depend on distances alone, so that positions begin again with a document changes nothing but rounding: the digits
that a large position costs. Which positions a document has here is therefore the model's business, not this module's.

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


class Documents:
    """Where the documents of a batch begin: made once, used by all layers of a forward pass.

    Args:
        position_ids: the place of each token in its document, int64 [B, L]; a document begins at every 0, and with every window.
    """

    def __init__(self, position_ids: Tensor) -> None:
        self.begins = position_ids == 0
        self.begins[:, 0] = True  # so that no window is ever joined to the one before

    @cached_property
    def starts(self) -> Tensor:
        """The first token of each document, counted through all windows, and behind the last their number: int64 [S + 1]."""
        starts = self.begins.flatten().nonzero().squeeze(1)
        return functional.pad(starts, (0, 1), value=self.begins.numel())

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        lengths: list[int] = self.starts.diff().tolist()
        return lengths

    @cached_property
    def mask(self) -> Tensor:
        """Whether a position (row) reads another (column): bool [B, 1, L, L]."""
        number = self.begins.cumsum(1)
        return (number[:, None, :, None] == number[:, None, None, :]).tril()

    @classmethod
    def stay_out_of_graphs(cls) -> None:
        """Keep what depends on the lengths of documents, other ones in each batch, out of what torch compiles."""
        cls._one_by_one = torch.compiler.disable(cls._one_by_one)  # type: ignore[method-assign, no-untyped-call]

    def prepare(self, example: Tensor, dropout_p: float = 0.0) -> None:
        """Work out now what `attend` will need for queries such as this one, [..., D]: layers that are compiled could not."""
        if self._goes_one_by_one(example.device):
            _ = self.lengths
        elif dropout_p == 0 and flash_kernel(example) is not None:
            _ = self.starts
        else:
            _ = self.mask

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, dropout_p: float = 0.0) -> Tensor:
        """Let each position read those of its document up to its own.

        Args:
            queries: [B, L, heads, D].
            keys: [B, L, key and value heads, D], each of which serves an equal group of query heads.
            values: the same.
            dropout_p: the chance of dropping a weight of attention.

        Returns:
            [B, L, heads, D].
        """
        if self._goes_one_by_one(queries.device):
            return self._one_by_one(queries, keys, values, dropout_p)
        kernel = flash_kernel(queries) if dropout_p == 0 else None
        if kernel is not None:
            return self._flash(kernel, queries, keys, values)
        return self._masked(queries, keys, values, dropout_p)

    def _goes_one_by_one(self, device: torch.device) -> bool:
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
        longest = queries.shape[1]  # an upper bound: the true one would have to come from the device
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
    """Return the kernel for sequences of different lengths if it takes such queries, [..., D], on their device."""
    fits = (
        queries.device.type == "cuda"
        and torch.version.hip is None
        and queries.dtype in {torch.bfloat16, torch.float16}
        and queries.shape[-1] in _FLASH_HEAD_SIZES
        and torch.cuda.get_device_capability(queries.device) >= _FLASH_CAPABILITY
    )
    return _varlen_attention() if fits else None


_VARLEN: list[Callable[..., Any] | None] = []
"""What `_varlen_attention` has found; no cache of functools, which layers that are compiled warn about."""


def _varlen_attention() -> Callable[..., Any] | None:
    """Return torch's `varlen_attn` in the form that is called here; older torch has none, or one without groups of heads."""
    if not _VARLEN:
        try:
            from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 - only where it is wanted and there
        except ImportError:
            _VARLEN.append(None)
        else:
            wanted = {"window_size", "enable_gqa"}
            fits = wanted <= inspect.signature(varlen_attn).parameters.keys()
            _VARLEN.append(varlen_attn if fits else None)
    return _VARLEN[0]
