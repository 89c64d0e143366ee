"""Tensors of which each rank holds a block of rows, as `fully_shard` makes them: which rows those are, and back to what they belong to.

`torch.distributed.tensor` takes a second to be imported, so nobody does it here; whoever has a sharded tensor has done it.
"""

from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["is_sharded", "own_rows", "sharded_like", "whole"]


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether each rank holds some rows of a tensor."""
    return hasattr(tensor, "device_mesh")


def own_rows(tensor: "DTensor") -> tuple[Tensor, int]:
    """Return the rows that this rank holds, the tensor's own memory, and the number of the first one."""
    mesh = tensor.device_mesh
    rows = tensor.to_local()
    first = min(mesh.get_local_rank() * -(-len(tensor) // mesh.size()), len(tensor))
    return rows, first


def sharded_like(tensor: "DTensor", rows: Tensor) -> "DTensor":
    """Return a tensor of the same shape, sharded in the same way, of which this rank holds `rows`."""
    return type(tensor).from_local(
        rows.to(tensor.device),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as a plain one; where it is sharded every rank asks at the same time."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor
