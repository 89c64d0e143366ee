"""What stands in a layer's `mlp` place: one MLP, or a mixture of experts, of which each token goes through a few.

The router is a matrix: its softmax says how well each expert suits a token, the best `num_experts_per_tok` take it, and their
answers are added up by those weights. Shared experts take every token, with weight 1. Routing is exact: no expert has a limit,
no token is dropped, so a window's hidden states do not depend on what it shares a batch with. The router computes in float32 even
under autocast, because a rounded score can send a token elsewhere (https://arxiv.org/abs/2101.03961, 2.4).

All tokens of a batch are sorted by expert, so that each expert's are one slice. On CUDA in bf16, from Hopper on, the slices of all
experts are one grouped multiplication, which asks nothing of the host; elsewhere they go through their experts one after the other, as
torch's own grouped multiplication does there (on Ampere too: https://github.com/pytorch/pytorch/pull/161407). On the CPU, with
the sizes of minimind-3-moe in fp32, forward and backward, that took 1.09 of the time of one MLP over the same 2,048 tokens (1.00 at
8,192), and the grouped multiplication 1.14 (1.08); on another device it waits for the sizes, once a layer. Figures:
`benchmarks/experts.py`.

Every expert is an MLP of its own under MiniMind's and Qwen3-MoE's names, `mlp.experts.N.gate_proj.weight`, and not a slice of one
large tensor: so a checkpoint is read elsewhere as it is, and an optimizer that is made for matrices, as Muon is, sees matrices. The
grouped multiplication wants them side by side in its dtype; under autocast they have to be copied into that dtype anyway, and
`_side_by_side` does both at once.

Shapes: B windows, L positions, N tokens of all windows, K experts of a token, E experts, H hidden size, M width inside an expert.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from minimind_train.model.config import ModelConfig

_GROUPED_CAPABILITY = (9, 0)
_GROUPED_ALIGNMENT = 16  # bytes, of every row of what is multiplied


class MLP(nn.Module):
    """SwiGLU: one projection gates another."""

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, size, bias=False)
        self.up_proj = nn.Linear(hidden_size, size, bias=False)
        self.down_proj = nn.Linear(size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the last axis."""
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
        """Take [B, L, H] to [B, L, H], and say how unevenly the experts were used, which is None where nobody asks."""
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
        """Return each token's scores [B, L, E] and, [B, L, K], the weights and the numbers of its experts."""
        with torch.autocast(x.device.type, enabled=False):
            logits = functional.linear(x.float(), self.gate.weight.float())
        scores = logits.sigmoid() if self.config.scoring_func == "sigmoid" else logits.softmax(-1)
        weights, chosen = scores.topk(self.config.num_experts_per_tok, dim=-1)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return scores, weights, chosen

    def _through_experts(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Send tokens [N, H] through their experts [N, K], and add up what comes out by its weights: [N, H]."""
        num_tokens, num_each = chosen.shape
        expert_of = chosen.flatten()
        order = expert_of.argsort(stable=True)
        ends = torch.searchsorted(
            expert_of[order],
            torch.arange(len(self.experts), device=order.device),
            right=True,
            out_int32=True,
        )
        # Each copy of a token is moved by a permutation, whose gradient adds nothing up: so it is the same every time.
        copies = tokens[:, None].expand(-1, num_each, -1).flatten(0, 1)
        out = self._slices_through_experts(copies.index_select(0, order), ends)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        out = out.index_select(0, back).view(num_tokens, num_each, -1)
        return (out * weights[..., None]).sum(1).to(out.dtype)

    def _slices_through_experts(self, sorted_tokens: Tensor, ends: Tensor) -> Tensor:
        """Take the tokens [N K, H] up to each end, int32 [E], from the end before through one expert after the other."""
        device = sorted_tokens.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else sorted_tokens.dtype
        if _has_grouped_kernel(sorted_tokens.device, dtype, self.config):
            return self._grouped(sorted_tokens.to(dtype), ends)
        out: Tensor = self._one_after_the_other(sorted_tokens, ends)
        return out

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it asks for the sizes, and would be compiled anew for every batch that has others
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
        """Do the same by two grouped multiplications, in the dtype of the tokens."""
        dtype = sorted_tokens.dtype
        used = ends.diff(prepend=ends.new_zeros(1)) > 0
        experts = cast("list[MLP]", list(self.experts))
        gates_and_ups = [
            projection.weight for expert in experts for projection in (expert.gate_proj, expert.up_proj)
        ]
        downs = [expert.down_proj.weight for expert in experts]
        with torch.autocast(sorted_tokens.device.type, enabled=False):
            # [E, 2 M, H]: an expert's gate lies before its up, so both are one multiplication.
            inward = _side_by_side(gates_and_ups, dtype, used).view(len(downs), -1, sorted_tokens.shape[1])
            gate, up = functional.grouped_mm(sorted_tokens, inward.transpose(1, 2), offs=ends).chunk(2, -1)
            outward = _side_by_side(downs, dtype, used).transpose(1, 2)
            return functional.grouped_mm(functional.silu(gate) * up, outward, offs=ends)


def imbalance(scores: Tensor, chosen: Tensor, *, per_window: bool) -> Tensor:
    """Return how unevenly experts were used, float32 []: the mean over what follows, least where all are used alike.

    Within a window (DeepSeek-V2, https://arxiv.org/abs/2405.04434, 2.2.3): the sum over the experts of their share of the choices
    times their mean score, times E, which is 1 where all is even. Over the whole batch it is what minimind-3 and transformers
    compute: the same, but times K. All positions count, PAD too, as they do in MiniMind.

    Args:
        scores: of every expert, adding up to 1, float32 [B, L, E].
        chosen: the experts of each token, int64 [B, L, K].
        per_window: in each window by itself, or over all of them.
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
    """Tell whether torch has a kernel for grouped multiplication there; in other dtypes it is a loop, as ours is."""
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


class _SideBySide(torch.autograd.Function):
    """Matrices of one shape [...] copied into one tensor [number, ...] of another dtype, in one pass over each.

    What is not `used` has a gradient of zeros, whatever comes back: for groups without tokens torch's kernel left in it what the memory
    held before, on Blackwell (https://github.com/pytorch/pytorch/issues/172439).
    """

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, used: Tensor, *matrices: Tensor) -> Tensor:
        ctx.dtype = matrices[0].dtype
        ctx.save_for_backward(used)
        out = matrices[0].new_empty((len(matrices), *matrices[0].shape), dtype=dtype)
        for place, matrix in zip(out, matrices, strict=True):
            place.copy_(matrix)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (used,) = ctx.saved_tensors
        of_experts = grad.reshape(len(used), -1, *grad.shape[1:])
        grad = of_experts.where(used[:, None, None, None], 0).flatten(0, 1)
        return None, None, *(each.to(ctx.dtype) for each in grad)


def _side_by_side(matrices: list[Tensor], dtype: torch.dtype, used: Tensor) -> Tensor:
    """Copy the matrices of experts, as many of each, one after the other; `used`, bool [E], says which of these have tokens."""
    out: Tensor = _SideBySide.apply(dtype, used, *matrices)  # type: ignore[no-untyped-call]
    return out
