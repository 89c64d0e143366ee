"""Sharded tensors, of which each rank holds a block of rows, as `fully_shard` makes them: their own rows, and back to whole tensors.

`torch.distributed.tensor` takes a second to import, so it is not imported here; where there is a sharded tensor, it has been.
"""

from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["is_sharded", "own_rows", "sharded_like", "whole"]


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether each rank holds only some rows of the tensor."""
    return hasattr(tensor, "device_mesh")


def own_rows(tensor: "DTensor") -> tuple[Tensor, int]:
    """Return the rows that this rank holds, a view of the tensor's memory, and the number of the first."""
    mesh = tensor.device_mesh
    rows = tensor.to_local()
    first = min(mesh.get_local_rank() * -(-len(tensor) // mesh.size()), len(tensor))
    return rows, first


def sharded_like(tensor: "DTensor", rows: Tensor) -> "DTensor":
    """Return a tensor of the same shape and sharding, of which this rank holds `rows`."""
    return type(tensor).from_local(
        rows.to(tensor.device),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def whole(tensor: Tensor) -> Tensor:
    """Return a plain tensor of all rows; for a sharded tensor this is a collective."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor
