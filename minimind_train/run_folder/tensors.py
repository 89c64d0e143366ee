"""The tensors of a checkpoint: which of a model and its optimizer they are, how they lie in files, and how they come back.

A tensor is stored whole in one safetensors file, or in parts of some rows each: a part of `NAME` that begins at row 128 is `NAME@128`.
So files that several ranks wrote, each what it held, are read by any other number of ranks, and none of them reads more than it will
hold. What the files of a checkpoint are besides, and when they are believed, is in `checkpoint`.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from minimind_data.errors import UserError
from minimind_train.parallel.sharding import is_sharded, own_rows, sharded_like

_MARK = "@"


def to_be_stored(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return tensors by the names under which they are stored: of the sharded ones the rows that this rank holds, if any."""
    stored: dict[str, Tensor] = {}
    for name, tensor in named:
        if not is_sharded(tensor):
            stored[name] = tensor.detach().contiguous()
            continue
        rows, first = own_rows(tensor)
        if len(rows):
            stored[f"{name}{_MARK}{first}"] = rows.detach().contiguous()
    return stored


class StoredTensors:
    """The tensors in some files.

    Args:
        files: all parts of every tensor.

    Attributes:
        shapes: of the whole tensors, by name.

    Raises:
        OSError, SafetensorError: one cannot be read.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._parts: dict[str, dict[int, tuple[Any, str]]] = {}
        self.shapes: dict[str, list[int]] = {}
        for path in files:
            file: Any = safe_open(path, framework="pt")
            for stored in file.keys():  # noqa: SIM118 - not a dict
                name, _, first = stored.partition(_MARK)
                shape = file.get_slice(stored).get_shape()
                if shape:
                    shape[0] += int(first or 0)
                self.shapes[name] = max(shape, self.shapes.get(name, shape))
                self._parts.setdefault(name, {})[int(first or 0)] = (file, stored)

    def whole(self, name: str) -> Tensor:
        """Return a tensor, on the CPU; a map of the file where it stands in one."""
        parts = self._parts[name]
        found = [file.get_tensor(stored) for _, (file, stored) in sorted(parts.items())]
        return found[0] if len(found) == 1 else torch.cat(found)

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Return so many rows of a tensor, on the CPU."""
        found = []
        for begin, (file, stored) in sorted(self._parts[name].items()):
            part = file.get_slice(stored)
            end = begin + part.get_shape()[0]
            here = slice(max(first, begin) - begin, max(min(first + count, end), begin) - begin)
            found.append(part[here.start : max(here.start, here.stop)])
        return torch.cat(found)


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
