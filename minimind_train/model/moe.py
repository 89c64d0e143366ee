"""The feed-forward part of a layer: an MLP, or a mixture of experts, of which each token goes through a few.

The router is a matrix: its softmax scores each expert for each token, the best `num_experts_per_tok` take the token, and their
outputs are added up with the scores as weights. Shared experts take every token, with weight 1. Routing is exact: experts have no
capacity and no token is dropped, so a window's hidden states do not depend on the rest of its batch. The router computes in float32 even
under autocast, because a rounded score can send a token to another expert (https://arxiv.org/abs/2101.03961, 2.4).

All tokens of a batch are sorted by expert, so that those of one expert are one slice. On CUDA in bf16, from Hopper on, the slices of all
experts are one grouped multiplication, for which the host need not wait; elsewhere they go through their experts one after the other, as
torch's own grouped multiplication does there (on Ampere too: https://github.com/pytorch/pytorch/pull/161407). On the CPU, with
the sizes of minimind-3-moe in fp32, forward and backward, that took 1.09 of the time of one MLP over the same 2,048 tokens (1.00 at
8,192), and the grouped multiplication 1.14 (1.08); on another device the host waits for the sizes, once a layer. Figures:
`benchmarks/experts.py`.

Every expert is an MLP of its own under MiniMind's and Qwen3-MoE's names, `mlp.experts.N.gate_proj.weight`, not a slice of one
large tensor. So other programs read a checkpoint as it is, and an optimizer for matrices, such as Muon, sees matrices. The
grouped multiplication needs them stacked in its dtype; under autocast they must be copied into that dtype anyway, and
`_stack` does both at once.

Shapes: B windows, L positions, N tokens of all windows, K experts of a token, E experts, H hidden size, M width inside an expert.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from minimind_train.model.config import ModelConfig

_GROUPED_CAPABILITY = (9, 0)
_GROUPED_ALIGNMENT = 16  # bytes; every row of a matrix must be a multiple of it


class MLP(nn.Module):
    """SwiGLU: one projection gates another."""

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, size, bias=False)
        self.up_proj = nn.Linear(hidden_size, size, bias=False)
        self.down_proj = nn.Linear(size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map the last axis."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Mixture(nn.Module):
    """A mixture of experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            MLP(config.hidden_size, config.expert_size) for _ in range(config.num_experts)
        )
        self.shared_experts = nn.ModuleList(
            MLP(config.hidden_size, config.expert_size) for _ in range(config.n_shared_experts)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the output, [B, L, H], and the imbalance of the experts, which is None where it is not needed."""
        scores, weights, chosen = self._route(x)
        mixed = self._through_experts(x.flatten(0, 1), weights.flatten(0, 1), chosen.flatten(0, 1)).view_as(x)
        for expert in self.shared_experts:
            mixed = mixed + expert(x)
        if not self.training or self.config.router_aux_loss_coef == 0:
            return mixed, None
        if self.config.scoring_func == "sigmoid":
            scores = scores / scores.sum(-1, keepdim=True)
        return mixed, imbalance(scores, chosen, per_window=self.config.seq_aux)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return each token's scores [B, L, E], and the weights and the numbers of its experts, [B, L, K] each."""
        with torch.autocast(x.device.type, enabled=False):
            logits = functional.linear(x.float(), self.gate.weight.float())
        scores = logits.sigmoid() if self.config.scoring_func == "sigmoid" else logits.softmax(-1)
        weights, chosen = scores.topk(self.config.num_experts_per_tok, dim=-1)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return scores, weights, chosen

    def _through_experts(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Return the weighted sum of the outputs of each token's experts: tokens [N, H], weights and experts [N, K], result [N, H]."""
        num_tokens, num_each = chosen.shape
        expert_of = chosen.flatten()
        order = expert_of.argsort(stable=True)
        ends = torch.searchsorted(
            expert_of[order],
            torch.arange(len(self.experts), device=order.device),
            right=True,
            out_int32=True,
        )
        # Copies of tokens are moved by a permutation: its gradient is no sum, so it is the same every time.
        copies = tokens[:, None].expand(-1, num_each, -1).flatten(0, 1)
        out = self._slices_through_experts(copies.index_select(0, order), ends)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        out = out.index_select(0, back).view(num_tokens, num_each, -1)
        return (out * weights[..., None]).sum(1).to(out.dtype)

    def _slices_through_experts(self, sorted_tokens: Tensor, ends: Tensor) -> Tensor:
        """Put the tokens, [N K, H] sorted by expert, through their experts; `ends`, int32 [E], are the ends of the experts' slices."""
        device = sorted_tokens.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else sorted_tokens.dtype
        if _has_grouped_kernel(sorted_tokens.device, dtype, self.config):
            return self._grouped(sorted_tokens.to(dtype), ends)
        out: Tensor = self._one_after_the_other(sorted_tokens, ends)
        return out

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it reads the sizes, and would be compiled again for every batch with other sizes
    def _one_after_the_other(self, sorted_tokens: Tensor, ends: Tensor) -> Tensor:
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        return torch.cat(
            [
                expert(tokens)
                for expert, tokens in zip(self.experts, torch.split(sorted_tokens, sizes), strict=True)
                # In training an expert without tokens still gets its gradient, of zeros, as every parameter does.
                if len(tokens) or torch.is_grad_enabled()
            ]
        )

    def _grouped(self, sorted_tokens: Tensor, ends: Tensor) -> Tensor:
        """Do the same with two grouped multiplications, in the dtype of the tokens."""
        dtype = sorted_tokens.dtype
        used = ends.diff(prepend=ends.new_zeros(1)) > 0
        experts = cast("list[MLP]", list(self.experts))
        gates_and_ups = [
            projection.weight for expert in experts for projection in (expert.gate_proj, expert.up_proj)
        ]
        downs = [expert.down_proj.weight for expert in experts]
        with torch.autocast(sorted_tokens.device.type, enabled=False):
            # [E, 2 M, H]: an expert's gate lies before its up projection, so both are one multiplication.
            inward = _stack(gates_and_ups, dtype, used).view(len(downs), -1, sorted_tokens.shape[1])
            gate, up = functional.grouped_mm(sorted_tokens, inward.transpose(1, 2), offs=ends).chunk(2, -1)
            outward = _stack(downs, dtype, used).transpose(1, 2)
            return functional.grouped_mm(functional.silu(gate) * up, outward, offs=ends)


def imbalance(scores: Tensor, chosen: Tensor, *, per_window: bool) -> Tensor:
    """Return how unevenly experts are used, float32 []; it is lowest where all are used alike.

    Within windows (DeepSeek-V2, https://arxiv.org/abs/2405.04434, 2.2.3) it is the mean over the windows of this: the sum over the
    experts of their share of the choices times their mean score, times E, which is 1 where all is even. Over the whole batch it is what
    minimind-3 and transformers compute: the same times K. All positions count, PAD too, as in MiniMind.

    Args:
        scores: of every expert, with a sum of 1, float32 [B, L, E].
        chosen: the experts of each token, int64 [B, L, K].
        per_window: within each window, or over the whole batch.
    """
    if not per_window:
        scores, chosen = scores.flatten(0, 1)[None], chosen.flatten(0, 1)[None]
    num_windows, num_tokens, num_experts = scores.shape
    choices = chosen.flatten(1)
    counts = scores.new_zeros(num_windows, num_experts).scatter_add_(
        1, choices, scores.new_ones(choices.shape)
    )
    shares = counts * (num_experts / (choices.shape[1] if per_window else num_tokens))
    return (shares * scores.mean(1)).sum(-1).mean()


def _has_grouped_kernel(device: torch.device, dtype: torch.dtype, config: ModelConfig) -> bool:
    """Tell whether torch has a kernel for grouped multiplication there; elsewhere its implementation is a loop, as ours is."""
    return (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and hasattr(functional, "grouped_mm")
        and all(
            size * dtype.itemsize % _GROUPED_ALIGNMENT == 0
            for size in (config.hidden_size, config.expert_size)
        )
        and torch.cuda.get_device_capability(device) >= _GROUPED_CAPABILITY
    )


class _Stack(torch.autograd.Function):
    """Matrices of one shape [...] copied into one tensor [number, ...] of another dtype, in one pass over each.

    Experts that are not `used` get a gradient of zeros, whatever comes back: on Blackwell torch's kernel leaves the gradient of groups
    without tokens uninitialised (https://github.com/pytorch/pytorch/issues/172439).
    """

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, used: Tensor, *matrices: Tensor) -> Tensor:
        ctx.dtype = matrices[0].dtype
        ctx.save_for_backward(used)
        out = matrices[0].new_empty((len(matrices), *matrices[0].shape), dtype=dtype)
        for row, matrix in zip(out, matrices, strict=True):
            row.copy_(matrix)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (used,) = ctx.saved_tensors
        of_experts = grad.reshape(len(used), -1, *grad.shape[1:])
        grad = of_experts.where(used[:, None, None, None], 0).flatten(0, 1)
        return None, None, *(each.to(ctx.dtype) for each in grad)


def _stack(matrices: list[Tensor], dtype: torch.dtype, used: Tensor) -> Tensor:
    """Stack the matrices of experts, the same number for each; `used`, bool [E], says which experts have tokens."""
    out: Tensor = _Stack.apply(dtype, used, *matrices)  # type: ignore[no-untyped-call]
    return out
