"""LoRA: two thin matrices are trained beside each target matrix, and nothing else (https://arxiv.org/abs/2106.09685).

A target matrix W [out, in] is frozen; its product with x becomes W x + (alpha / rank) B A x, where A [rank, in] is initialised as in
MiniMind and B [out, rank] with zeros, so that a run starts with the model of its initial weights. The names of adapters
begin with that of their matrix: `model.layers.0.self_attn.q_proj.lora_A`.

Targets are the matrices of attention and, in a dense model, of the MLP. Experts get no adapters: their matrices are multiplied
together, where the adapter of one has no place.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from minimind_train.model.config import LoraConfig
from minimind_train.model.transformer import MiniMind

__all__ = ["LoraLinear", "adapters_of", "add_adapters", "merge_adapters"]


class LoraLinear(nn.Module):
    """A linear layer with an adapter; its own weight keeps its name."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.weight = base.weight
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(base.out_features, rank))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        change = functional.linear(functional.linear(x, self.lora_A), self.lora_B)
        return functional.linear(x, self.weight) + self.scale * change

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return a linear layer that does the same without an adapter."""
        out_features, in_features = self.weight.shape
        linear = nn.Linear(in_features, out_features, bias=False, device="meta")
        product = self.lora_B.double() @ self.lora_A.double()
        linear.weight = nn.Parameter((self.weight.double() + self.scale * product).to(self.weight.dtype))
        return linear


def add_adapters(model: MiniMind, config: LoraConfig, seed: int) -> None:
    """Freeze all weights of a model, in place, and add adapters to the matrices that `config` names.

    The numbers are drawn on the CPU from `seed` alone, in the order of the parameters.

    Raises:
        ValueError: the model has no such matrices.
    """
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    config.refuse_unfit(model.config)
    targets = set(config.targets)
    for layer in model.model.layers:
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if name in targets and isinstance(child, nn.Linear):
                    adapted = LoraLinear(child, config.lora_rank, config.scale)
                    noise = torch.empty(adapted.lora_A.shape).normal_(0.0, 0.02, generator=generator)
                    adapted.lora_A.data.copy_(noise)
                    setattr(module, name, adapted)


def merge_adapters(model: MiniMind) -> None:
    """Merge every adapter into its matrix, in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoraLinear):
                setattr(module, name, child.merged())


def adapters_of(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the matrices of a model that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
