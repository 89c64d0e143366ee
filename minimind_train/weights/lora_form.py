"""MiniMind's adapters: its `lora_*.pth`, merged into the weights that they belong to, and written from a run's adapters.

Every linear layer there whose matrix is square has an adapter, W x + B A x, with no other scale; its tensors are called
`model.layers.0.self_attn.q_proj.lora.A.weight` [rank, in] and `.lora.B.weight` [out, rank]. Its scripts make adapters of rank 16 before
they load a file, and need each of them in it.

Source: https://github.com/jingyaogong/minimind, model/model_lora.py.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from minimind_data.errors import UserError
from minimind_train.model.lora import LoraLinear, adapters_of
from minimind_train.model.transformer import MiniMind
from minimind_train.weights.foreign import EMBEDDING_NAME

__all__ = ["USUAL_RANK", "holds_adapters", "lora_tensors", "merged_with", "split_adapters"]

USUAL_RANK = 16
"""The rank that MiniMind's scripts load."""
_A, _B = ".lora.A.weight", ".lora.B.weight"


def split_adapters(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (all other tensors, those of adapters); MiniMind's resume files of LoRA hold both."""
    names = {name.removeprefix("module."): name for name in tensors}
    adapters = {short: tensors[name] for short, name in names.items() if short.endswith((_A, _B))}
    return {name: tensors[name] for name in tensors if not name.endswith((_A, _B))}, adapters


def holds_adapters(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether a file holds adapters and no model."""
    weights, adapters = split_adapters(tensors)
    return bool(adapters) and not weights


@torch.no_grad()
def merged_with(
    weights: Mapping[str, Tensor], adapters: Mapping[str, Tensor], source: Path
) -> dict[str, Tensor]:
    """Return weights with adapters added to their matrices.

    Args:
        weights: of a model, by name.
        adapters: by MiniMind's names.
        source: of the adapters, for the error.

    Raises:
        UserError: there is none, or one is for a matrix that the model does not have, or is cut off.
    """
    merged = dict(weights)
    names = {name.removesuffix(_A).removesuffix(_B) for name in adapters}
    if not names:
        raise UserError(
            "holds no adapters of MiniMind's, whose names end with .lora.A.weight",
            where=source,
            remedy="pass a lora_*.pth by `lora`",
            option="lora",
        )
    for name in sorted(names):
        down, up = adapters.get(f"{name}{_A}"), adapters.get(f"{name}{_B}")
        matrix = weights.get(f"{name}.weight")
        shapes = [None if tensor is None else list(tensor.shape) for tensor in (matrix, down, up)]
        if (
            matrix is None
            or down is None
            or up is None
            or not matrix.ndim == down.ndim == up.ndim == 2
            or [*matrix.shape] != [up.shape[0], down.shape[1]]
            or up.shape[1] != down.shape[0]
        ):
            of_each = ["absent" if shape is None else str(shape) for shape in shapes]
            raise UserError(
                f"its adapter does not fit this model: {name} is {of_each[0]}, and A is {of_each[1]} and B {of_each[2]}",
                where=source,
                remedy="pass by `run` the weights that it was trained beside",
                option="lora",
            )
        merged[f"{name}.weight"] = (matrix.double() + up.double() @ down.double()).to(matrix.dtype)
    return merged


def lora_tensors(model: MiniMind) -> tuple[dict[str, Tensor], int]:
    """Return the adapters of a model by MiniMind's names, and their rank in the file.

    The scale of a run is put into B. Ranks below 16 are filled with zeros, and matrices that have adapters there and none here get
    zeros too: the products are the same.

    Raises:
        UserError: a matrix that is not square has an adapter, for which there is no place.
    """
    adapters = adapters_of(model)
    tensors: dict[str, Tensor] = {}
    rank = USUAL_RANK
    for name, layer in adapters.items():
        if layer.weight.shape[0] != layer.weight.shape[1]:
            raise UserError(
                f"`to` minimind-lora: {name} is {list(layer.weight.shape)}, and MiniMind has adapters for square matrices alone",
                remedy="export it merged, by `to` minimind",
                option="to",
            )
        rank = max(rank, layer.lora_A.shape[0])
    for key, matrix in model.state_dict().items():
        name = key.removesuffix(".weight")
        if not key.endswith(".weight") or key == EMBEDDING_NAME:
            continue
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            continue
        width = matrix.shape[0]
        down, up = matrix.new_zeros(rank, width), matrix.new_zeros(width, rank)
        if (adapter := adapters.get(name)) is not None:
            _fill(adapter, down, up)
        tensors |= {f"{name}{_A}": down, f"{name}{_B}": up}
    return tensors, rank


@torch.no_grad()
def _fill(adapter: LoraLinear, down: Tensor, up: Tensor) -> None:
    rank = adapter.lora_A.shape[0]
    down[:rank] = adapter.lora_A
    up[:, :rank] = adapter.scale * adapter.lora_B
