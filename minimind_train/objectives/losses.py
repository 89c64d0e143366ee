"""Cross-entropy of the next token, or its log-probability, from hidden states, without ever holding all the logits.

With a vocabulary of 6,400 the logits of 4,096 tokens fill 105 MB in float32, and their gradient as much again. Here the loss of one
chunk of tokens is computed at a time and, in the same pass, its gradients, so that only the gradients are kept for
the backward pass. That is also faster than the usual way: less memory is read and written, and nothing is
computed twice. Only log-probabilities of single tokens need a chunk's logits a second time in the backward pass, because their
gradients are not known before.

Shapes in names: B batch, L positions, N all positions of a batch in a row, H hidden size, V vocabulary.
"""

# ruff: noqa: N803, N806 (capital letters in names are shapes)

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimind_data.dataset.format import IGNORED

_CHUNK_LOGITS = 2**22  # 16 MB in float32; between 2^21 and 2^23 the speed is the same
_MIN_CHUNK_TOKENS = 256  # below this the matrix products of a large vocabulary grow slow


def summed_cross_entropy(hidden_BLH: Tensor, head_weight_VH: Tensor, targets_BL: Tensor) -> Tensor:
    """Return the sum, in float32, of the cross-entropies at all targets that are not `IGNORED`.

    Equal to `cross_entropy(hidden @ head_weight.T, targets, reduction="sum")` up to rounding, gradients too, and the
    same bit for bit at every call. Under autocast the matrix products are in its dtype, all else is in float32.

    Args:
        hidden_BLH: hidden states, [..., H].
        head_weight_VH: the output matrix, [V, H].
        targets_BL: the token that follows each position, int64 [...], or `IGNORED`.
    """
    hidden_NH, targets_N = hidden_BLH.flatten(0, -2), targets_BL.flatten()
    device = hidden_NH.device.type
    if device == "cpu":
        # Padding is left out on the CPU; on a GPU, looking for it would make the host wait for the device.
        learned = (targets_N != IGNORED).nonzero().squeeze(1)
        hidden_NH, targets_N = hidden_NH.index_select(0, learned), targets_N.index_select(0, learned)
    # The function below only looks at its inputs to see whether gradients are needed.
    if not torch.is_grad_enabled():
        hidden_NH, head_weight_VH = hidden_NH.detach(), head_weight_VH.detach()
    chunked_cross_entropy: Callable[..., Tensor] = _ChunkedCrossEntropy.apply
    dtype = _product_dtype(hidden_NH)
    with torch.autocast(device, enabled=False):
        return chunked_cross_entropy(hidden_NH, head_weight_VH, targets_N, dtype)


def summed_log_probs(hidden_BLH: Tensor, head_weight_VH: Tensor, targets_BL: Tensor) -> Tensor:
    """Return for each sequence the sum of the log-probabilities of its targets that are not `IGNORED`, float32 [B].

    Equal to `log_softmax(hidden @ head_weight.T)`, gathered at the targets and summed, up to rounding, gradients too, and the
    same bit for bit at every call.

    Args:
        hidden_BLH: hidden states, [B, L, H].
        head_weight_VH: the output matrix, [V, H].
        targets_BL: the token that follows each position, int64 [B, L], or `IGNORED`.
    """
    hidden_NH, targets_N = hidden_BLH.flatten(0, -2), targets_BL.flatten()
    device = hidden_NH.device.type
    chunked_log_probs: Callable[..., Tensor] = _ChunkedLogProbs.apply
    dtype = _product_dtype(hidden_NH)
    learned = None
    if device == "cpu":
        learned = (targets_N != IGNORED).nonzero().squeeze(1)
        hidden_NH, targets_N = hidden_NH.index_select(0, learned), targets_N.index_select(0, learned)
    with torch.autocast(device, enabled=False):
        log_probs_N = chunked_log_probs(hidden_NH, head_weight_VH, targets_N, dtype)
    if learned is not None:
        log_probs_N = log_probs_N.new_zeros(targets_BL.numel()).index_copy(0, learned, log_probs_N)
    return log_probs_N.view_as(targets_BL).sum(-1)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of matrix products: that of autocast where it is on."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _chunks(num_tokens: int, vocab_size: int) -> list[slice]:
    size = max(_MIN_CHUNK_TOKENS, _CHUNK_LOGITS // vocab_size)
    return [slice(start, start + size) for start in range(0, num_tokens, size)]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The summed loss; its gradients are computed in the forward pass, while the logits of a chunk are there."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, dtype: torch.dtype
    ) -> Tensor:
        with_gradients = any(ctx.needs_input_grad)
        weight = weight_VH.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
        if with_gradients:
            grad_hidden_NH = torch.empty_like(hidden_NH)
            # It is summed over the chunks, so in float32 even where the products have fewer bits.
            grad_weight_VH = (
                torch.zeros_like(weight_VH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
            )
        for chunk in _chunks(len(targets_N), len(weight_VH)):
            hidden = hidden_NH[chunk].to(dtype)
            targets = targets_N[chunk, None]
            learned = targets != IGNORED
            targets = targets.where(learned, 0)
            log_probs = torch.log_softmax((hidden @ weight.t()).float(), dim=-1)
            loss -= log_probs.gather(1, targets).where(learned, 0.0).sum()
            if with_gradients:
                grad_logits = log_probs.exp_().scatter_add_(
                    1, targets, log_probs.new_full(targets.shape, -1.0)
                )
                grad_logits = grad_logits.mul_(learned).to(dtype)
                grad_hidden_NH[chunk] = grad_logits @ weight
                if grad_weight_VH is not None:
                    _add_product(grad_weight_VH, grad_logits, hidden)
        if with_gradients:
            ctx.save_for_backward(grad_hidden_NH, _cast(grad_weight_VH, weight_VH.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        grad_hidden_NH, grad_weight_VH = ctx.saved_tensors
        for_weight = None if grad_weight_VH is None else grad_weight_VH * grad_loss
        return grad_hidden_NH * grad_loss, for_weight, None, None


class _ChunkedLogProbs(torch.autograd.Function):
    """The log-probability of each target, float32 [N], 0 at `IGNORED`; the backward pass computes a chunk's logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, dtype: torch.dtype
    ) -> Tensor:
        weight = weight_VH.to(dtype)
        log_probs_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_NH.device)
        totals_N = torch.empty_like(log_probs_N)  # log of the sum of the exponentials of all logits
        for chunk in _chunks(len(targets_N), len(weight_VH)):
            logits = (hidden_NH[chunk].to(dtype) @ weight.t()).float()
            targets = targets_N[chunk, None]
            learned = targets != IGNORED
            totals_N[chunk] = torch.logsumexp(logits, dim=-1)
            chosen = logits.gather(1, targets.where(learned, 0)).squeeze(1)
            log_probs_N[chunk] = (chosen - totals_N[chunk]).where(learned.squeeze(1), 0.0)
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, totals_N)
        ctx.dtype = dtype
        return log_probs_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden_NH, weight_VH, targets_N, totals_N = ctx.saved_tensors
        weight = weight_VH.to(ctx.dtype)
        grad_hidden_NH = torch.empty_like(hidden_NH)
        grad_weight_VH = None
        if ctx.needs_input_grad[1]:
            grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        for chunk in _chunks(len(targets_N), len(weight_VH)):
            hidden = hidden_NH[chunk].to(ctx.dtype)
            targets = targets_N[chunk, None]
            grad_log_probs = grad_N[chunk, None].where(targets != IGNORED, 0.0)
            # The gradient of log softmax at the target: one at the target, minus the probabilities everywhere.
            grad_logits = ((hidden @ weight.t()).float() - totals_N[chunk, None]).exp_().mul_(-grad_log_probs)
            grad_logits.scatter_add_(1, targets.clamp(min=0), grad_log_probs)
            products = grad_logits.to(ctx.dtype)
            grad_hidden_NH[chunk] = products @ weight
            if grad_weight_VH is not None:
                _add_product(grad_weight_VH, products, hidden)
        return grad_hidden_NH, _cast(grad_weight_VH, weight_VH.dtype), None, None


def _add_product(grad_weight_VH: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """Add the share of a chunk to the gradient of the output matrix, float32."""
    if hidden.dtype == torch.float32:
        grad_weight_VH.addmm_(grad_logits.t(), hidden)
    elif hidden.dtype == torch.float16:
        # Where one token is the target of a whole chunk, as many hidden states are added up, which could overflow fp16.
        shrink = 2.0 ** -len(hidden).bit_length()
        grad_weight_VH.add_(grad_logits.t() @ (hidden * shrink), alpha=1 / shrink)
    else:
        grad_weight_VH += grad_logits.t() @ hidden


def _cast(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if gradient is None else gradient.to(dtype)
