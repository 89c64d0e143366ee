"""Cross-entropy of the next token from hidden states, without ever holding all the logits.

With a vocabulary of 6,400 the logits of 4,096 tokens fill 105 MB in float32, and their gradient as much again. Here a
chunk of tokens at a time is taken to its loss and, in the same pass, to its gradients, so nothing is kept but what
the backward pass hands on. That is quicker than the plain way too: less memory is walked through, and nothing is
computed twice.

Shapes in names: B batch, L positions, N all positions of a batch in a row, H hidden size, V vocabulary.
"""

# ruff: noqa: N803, N806 (capital letters in names are shapes)

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimind_data.windows import IGNORED

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
        # Padding is left out here; on a GPU, asking where it is would stop the queue of kernels.
        learned = (targets_N != IGNORED).nonzero().squeeze(1)
        hidden_NH, targets_N = hidden_NH.index_select(0, learned), targets_N.index_select(0, learned)
    if not torch.is_grad_enabled():  # the function below looks at its inputs only
        hidden_NH, head_weight_VH = hidden_NH.detach(), head_weight_VH.detach()
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NH.dtype
    chunked_cross_entropy: Callable[..., Tensor] = _ChunkedCrossEntropy.apply
    with torch.autocast(device, enabled=False):
        return chunked_cross_entropy(hidden_NH, head_weight_VH, targets_N, dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The loss and, while the logits of a chunk are at hand, its gradients for a loss that is used as it is."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, dtype: torch.dtype
    ) -> Tensor:
        with_gradients = any(ctx.needs_input_grad)
        num_tokens, vocab_size = len(targets_N), len(weight_VH)
        chunk = max(_MIN_CHUNK_TOKENS, _CHUNK_LOGITS // vocab_size)
        weight = weight_VH.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
        if with_gradients:
            grad_hidden_NH = torch.empty_like(hidden_NH)
            # Summed over the chunks, so in float32 even where the products are in fewer bits.
            grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        for start in range(0, num_tokens, chunk):
            here = slice(start, start + chunk)
            hidden = hidden_NH[here].to(dtype)
            targets = targets_N[here, None]
            learned = targets != IGNORED
            targets = targets.where(learned, 0)
            log_probs = torch.log_softmax((hidden @ weight.t()).float(), dim=-1)
            loss -= log_probs.gather(1, targets).where(learned, 0.0).sum()
            if with_gradients:
                grad_logits = log_probs.exp_().scatter_add_(
                    1, targets, log_probs.new_full(targets.shape, -1.0)
                )
                grad_logits = grad_logits.mul_(learned).to(dtype)
                grad_hidden_NH[here] = grad_logits @ weight
                if dtype == torch.float32:
                    grad_weight_VH.addmm_(grad_logits.t(), hidden)
                elif dtype == torch.float16:
                    # A token that is the target all over a chunk adds up as many hidden states, which could leave fp16.
                    shrink = 2.0 ** -chunk.bit_length()
                    grad_weight_VH.add_(grad_logits.t() @ (hidden * shrink), alpha=1 / shrink)
                else:
                    grad_weight_VH += grad_logits.t() @ hidden
        if with_gradients:
            ctx.save_for_backward(grad_hidden_NH, grad_weight_VH.to(weight_VH.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden_NH, grad_weight_VH = ctx.saved_tensors
        return grad_hidden_NH * grad_loss, grad_weight_VH * grad_loss, None, None
