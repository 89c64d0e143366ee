"""The tensors of a checkpoint: which tensors of a model and its optimizer are saved, how they are laid out in files, and restoring them.

A tensor is stored whole in one safetensors file, or in parts of some rows each: a part of `NAME` that begins at row 128 is `NAME@128`.
So files that several ranks wrote, each its own shard, can be read by any other number of ranks, and no rank reads more than it
holds. The other files of a checkpoint, and how they are checked, are in `checkpoint`.
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

MODEL_NAME = "model.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
_ROW_MARK = "@"
_MAX_DIGITS = 16  # of the number of a row
_DTYPE = "F32"
"""What every tensor of a checkpoint is, as safetensors calls it."""

Tensors = dict[str, dict[str, Tensor]]
"""All tensors of a checkpoint, by file and by name."""


def named_parts(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return tensors by the names under which they are stored; of sharded tensors the rows that this rank holds, if any."""
    parts: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if not is_sharded(tensor):
            parts[name] = tensor.detach().contiguous()
            continue
        rows, first = own_rows(tensor)
        if len(rows):
            parts[f"{name}{_ROW_MARK}{first}"] = rows.detach().contiguous()
    return parts


class StoredTensors:
    """The tensors of some files, read when they are asked for.

    Args:
        files: they hold all parts of every tensor.

    Attributes:
        shapes: the shapes of the whole tensors, by name.

    Raises:
        OSError, SafetensorError: a file cannot be read.
        UserError: parts do not make whole tensors, or tensors are not of float32.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._parts: dict[str, dict[int, tuple[Any, str]]] = {}
        self.shapes: dict[str, list[int]] = {}
        for path in files:
            file: Any = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118 - not a dict
                name, mark, digits = key.partition(_ROW_MARK)
                first = int(digits) if digits.isdecimal() and len(digits) < _MAX_DIGITS else 0
                part = file.get_slice(key)
                shape: list[int] = part.get_shape()
                if part.get_dtype() != _DTYPE or (mark and (not shape or str(first) != digits)):
                    raise UserError(
                        f"{key} is no tensor of a checkpoint", where=path, remedy="take another checkpoint"
                    )
                if shape:
                    shape[0] += first
                self.shapes[name] = max(shape, self.shapes.get(name, shape))
                self._parts.setdefault(name, {})[first] = (file, key)
        for name, parts in self._parts.items():
            self._refuse_gaps(name, parts)

    def _refuse_gaps(self, name: str, parts: dict[int, tuple[Any, str]]) -> None:
        """Refuse parts of which one does not begin where the one before it ends, or has rows of another shape."""
        num_rows = 0
        for first, (file, key) in sorted(parts.items()):
            shape = file.get_slice(key).get_shape()
            if first != num_rows or shape[1:] != self.shapes[name][1:]:
                raise UserError(f"the parts of {name} in the checkpoint do not make one tensor")
            num_rows += shape[0] if shape else 0

    def whole(self, name: str) -> Tensor:
        """Return a tensor, on the CPU; it is a memory map where one file holds all of it."""
        parts = [file.get_tensor(key) for _, (file, key) in sorted(self._parts[name].items())]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Return `count` rows of a tensor from row `first` on, on the CPU."""
        rows = []
        for begin, (file, key) in sorted(self._parts[name].items()):
            part = file.get_slice(key)
            end = begin + part.get_shape()[0]
            start = max(first, begin) - begin
            stop = max(min(first + count, end), begin) - begin
            rows.append(part[start : max(start, stop)])
        return torch.cat(rows)


def tensors_of(model: nn.Module, optimizer: Optimizer) -> Tensors:
    """Return the tensors that a checkpoint holds; they are not copied, so the next step changes them.

    Args:
        model: its `state_dict` is saved as it is, so a shared tensor must have one name in it; frozen parameters are left out.
        optimizer: its state for every parameter of the model is saved.
    """
    weights = _trainable_state(model)
    meshes = [tensor.device_mesh for tensor in weights.values() if is_sharded(tensor)]

    def file_of_this_rank(name: str) -> str:
        if not meshes:
            return name
        stem, _, suffix = name.rpartition(".")
        return f"{stem}-{meshes[0].get_local_rank() + 1:05d}-of-{meshes[0].size():05d}.{suffix}"

    return {
        file_of_this_rank(MODEL_NAME): named_parts(weights.items()),
        file_of_this_rank(OPTIMIZER_NAME): named_parts(_flat_state(optimizer, model)),
    }


def put_weights(folder: Path, model: nn.Module, stored: StoredTensors) -> None:
    """Load the stored weights into a model, bit for bit; a rank that holds some rows of a weight reads only those.

    Raises:
        UserError: the model is not the one that was saved in `folder`.
    """
    weights = _trainable_state(model)
    _refuse_other_shapes(folder, stored.shapes, weights)
    with torch.no_grad():
        for name, tensor in weights.items():
            if is_sharded(tensor):
                rows, first = own_rows(tensor)
                rows.copy_(stored.rows(name, first, len(rows)))
            else:
                tensor.copy_(stored.whole(name))


def _trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state of a model without the parameters that are frozen."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def _flat_state(optimizer: Optimizer, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{key}.{name}", torch.as_tensor(value)


def put_optimizer_state(optimizer: Optimizer, model: nn.Module, stored: StoredTensors) -> None:
    """Load the stored state of an optimizer of the same parameters.

    Raises:
        UserError: the tensors are not the state of the parameters.
    """
    parameters = dict(model.named_parameters())
    for key_and_name, shape in stored.shapes.items():
        key, _, name = key_and_name.partition(".")
        if name not in parameters or shape not in ([], list(parameters[name].shape)):
            raise UserError(
                f"the checkpoint is of another model: {key_and_name} is {shape}, and the model has no "
                f"{name} of that shape",
                remedy="go back to another checkpoint, or start a new run in another `run`",
            )
    by_name: dict[str, dict[str, Tensor]] = {}
    for key_and_name, shape in stored.shapes.items():
        key, name = key_and_name.split(".", 1)
        parameter = parameters.get(name)
        if parameter is not None and is_sharded(parameter) and shape == list(parameter.shape):
            rows, first = own_rows(parameter)
            value: Tensor = sharded_like(parameter, stored.rows(key_and_name, first, len(rows)))
        else:
            # A copy, because the loaded tensor is a memory map of the file, and aligned otherwise than the allocator's own tensors.
            value = stored.whole(key_and_name).clone()
        by_name.setdefault(name, {})[key] = value
    names = {parameter: name for name, parameter in parameters.items()}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state = {index: by_name[name] for index, name in enumerate(ordered) if name in by_name}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _refuse_other_shapes(folder: Path, stored: dict[str, list[int]], model: dict[str, Tensor]) -> None:
    expected = {name: list(tensor.shape) for name, tensor in model.items()}
    for name in sorted(stored.keys() | expected.keys()):
        sides = [shapes.get(name, "absent") for shapes in (stored, expected)]
        if sides[0] != sides[1]:
            raise UserError(
                f"the checkpoint is of another model: {name} is {sides[0]} in the checkpoint and {sides[1]} "
                "in this model",
                where=folder,
                remedy="give the model the options of its run, or start a new one in another `run`",
                option="run",
            )
