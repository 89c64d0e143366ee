"""Data parallelism: one objective on several ranks, whose gradients are averaged.

`ddp`: every rank has all weights and the whole state of the optimizer. Gradients are averaged while the last backward pass of a step is
still running. It is the fastest where a device has room for 16 bytes a parameter.

`fsdp`: every rank has a shard of each weight, of its gradient and of its optimizer state, by rows (`fully_shard`, FSDP2). A layer's weights
are gathered for its pass and freed afterwards: in bf16 or fp16 if that is the dtype, while the shards, the residual stream and the sums of
gradients are float32. The embedding, whose output is the residual stream, is gathered in float32.

Both average gradients over the ranks. The step multiplies its loss by the number of ranks, so that the averages are sums. Only the last
pass of a step has gradient traffic. For that, `fsdp` holds unsharded gradients on every rank from the first pass to the last; so where
memory is short, make only one pass in a step, with a micro-batch of the global batch over the number of ranks.
"""

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minimind_train.model.transformer import Layer
from minimind_train.objectives.objective import MicroLoss, Objective
from minimind_train.training.learner import Compute, Learner
from minimind_train.training.options import Parallel

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


def parallelize(objective: Objective, compute: Compute, parallel: Parallel) -> nn.Module:
    """Move an objective to its device, and with several ranks wrap or shard it, so that their gradients are averaged.

    Args:
        objective: on the CPU, so that no device ever holds all of what is sharded. Rank 0's weights are those that all ranks have
            afterwards. Sharding replaces its parameters by others, so the optimizer is made after this.
        compute: the ranks, and where this one computes.
        parallel: how.
    """
    world, device = compute.world, compute.device
    if world.size == 1:
        return objective.to(device)
    if parallel == "ddp":
        return DistributedDataParallel(
            objective.to(device),
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,  # so that no second copy of the gradients is held
        )
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 - takes a second
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # noqa: PLC0415

    for parameter in objective.parameters():
        world.broadcast_tensor(parameter.data)
    mesh = init_device_mesh(device.type, (world.size,))
    policy = MixedPrecisionPolicy(
        param_dtype=_DTYPES[compute.dtype], reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in list(objective.modules()):
        if isinstance(module, Layer):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh)
    return objective


def gradient_sync(objective: nn.Module, *, enabled: bool) -> AbstractContextManager[object]:
    """Return the context of a forward and backward pass, with averaging of gradients over the ranks or without."""
    if isinstance(objective, DistributedDataParallel):
        return contextlib.nullcontext() if enabled else objective.no_sync()
    if sync := getattr(objective, "set_requires_gradient_sync", None):  # it is sharded
        sync(enabled)
    return contextlib.nullcontext()


def settle(learner: Learner, micro_batch: Mapping[str, Tensor]) -> None:
    """Before the first step of a process, make one pass with gradient traffic that updates nothing. All ranks must call this.

    `DistributedDataParallel` lays out its buckets anew after the first such pass, in the order in which gradients arrived. With three ranks
    or more, the last bits of a sum depend on where in a bucket a gradient lies, so the first step of a resumed process would differ from
    that of a process that never stopped. After this pass all steps sum alike. The next step zeroes the gradients that this one leaves.
    """
    if not isinstance(learner.wrapped, DistributedDataParallel):
        return
    with learner.compute.forward():
        losses: MicroLoss = learner.wrapped(micro_batch)
        loss = losses.summed if losses.auxiliary is None else losses.summed + losses.auxiliary
    loss.backward()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def unsharded(learner: Learner) -> Iterator[None]:
    """Make the learner's model callable by itself inside the block, which all ranks must enter.

    `fully_shard` gathers the parameters outside of the layers (embedding, last norm, output matrix) only for a pass of the objective. So
    they are gathered here for the whole block. Layers are gathered in the dtype of matrix products, so the block runs in the context
    of a forward pass. If the objective is not sharded, this does nothing.
    """
    unshard, reshard = (getattr(learner.objective, name, None) for name in ("unshard", "reshard"))
    if unshard is None or reshard is None:
        yield
        return
    unshard()
    try:
        with learner.compute.forward():
            yield
    finally:
        reshard()
