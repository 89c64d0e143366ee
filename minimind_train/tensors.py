"""The tensors of a checkpoint: which of a model and its optimizer they are, and how they come back into both.

What the files of a checkpoint are besides, and when they are believed, is in `checkpoint`.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minimind_data.errors import UserError
from minimind_train.sharding import is_sharded, own_rows, sharded_like
from minimind_train.stored import StoredTensors, to_be_stored

MODEL_NAME = "model.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"

Tensors = dict[str, dict[str, Tensor]]
"""By file, by name: all the tensors of a checkpoint."""


def tensors_of(model: nn.Module, optimizer: Optimizer) -> Tensors:
    """Return the tensors themselves that a checkpoint of these is made of; the next step changes them.

    Args:
        model: its `state_dict` is saved as it is, so a shared tensor must have one name in it; frozen parameters are left out.
        optimizer: its state for every parameter of the model.
    """
    weights = _learned(model)
    meshes = [tensor.device_mesh for tensor in weights.values() if is_sharded(tensor)]

    def of_this_rank(name: str) -> str:
        if not meshes:
            return name
        stem, _, suffix = name.rpartition(".")
        return f"{stem}-{meshes[0].get_local_rank() + 1:05d}-of-{meshes[0].size():05d}.{suffix}"

    return {
        of_this_rank(MODEL_NAME): to_be_stored(weights.items()),
        of_this_rank(OPTIMIZER_NAME): to_be_stored(_flat_state(optimizer, model)),
    }


def put_weights(folder: Path, model: nn.Module, stored: StoredTensors) -> None:
    """Put the stored weights into a model, bit for bit; a rank that holds rows of a weight reads those alone.

    Raises:
        UserError: the model is not the one that was saved in `folder`.
    """
    here = _learned(model)
    _refuse_other_shapes(folder, stored.shapes, here)
    with torch.no_grad():
        for name, tensor in here.items():
            if is_sharded(tensor):
                rows, first = own_rows(tensor)
                rows.copy_(stored.rows(name, first, len(rows)))
            else:
                tensor.copy_(stored.whole(name))


def _learned(model: nn.Module) -> dict[str, Tensor]:
    """Return the state of a model without the parameters that are frozen."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def _flat_state(optimizer: Optimizer, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{key}.{name}", torch.as_tensor(value)


def put_optimizer_state(optimizer: Optimizer, model: nn.Module, stored: StoredTensors) -> None:
    """Give an optimizer the state that `_flat_state` took from another one over the same parameters."""
    parameters = dict(model.named_parameters())
    by_name: dict[str, dict[str, Tensor]] = {}
    for key_and_name, shape in stored.shapes.items():
        key, name = key_and_name.split(".", 1)
        parameter = parameters.get(name)
        if parameter is not None and is_sharded(parameter) and shape == list(parameter.shape):
            rows, first = own_rows(parameter)
            value: Tensor = sharded_like(parameter, stored.rows(key_and_name, first, len(rows)))
        else:
            # A copy, because what was loaded is a map of the file, and aligned otherwise than the allocator's own tensors.
            value = stored.whole(key_and_name).clone()
        by_name.setdefault(name, {})[key] = value
    names = {parameter: name for name, parameter in parameters.items()}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state = {index: by_name[name] for index, name in enumerate(ordered) if name in by_name}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _refuse_other_shapes(folder: Path, there: dict[str, list[int]], model: dict[str, Tensor]) -> None:
    here = {name: list(tensor.shape) for name, tensor in model.items()}
    for name in sorted(there.keys() | here.keys()):
        sides = [shapes.get(name, "absent") for shapes in (there, here)]
        if sides[0] != sides[1]:
            raise UserError(
                f"{folder}: the checkpoint is of another model: {name} is {sides[0]} in the checkpoint and {sides[1]} in this "
                "model; give the model the options of its run, or start a new one in another --run"
            )
