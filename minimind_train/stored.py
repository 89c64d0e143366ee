"""Tensors in safetensors files, each whole in one, or in parts of some rows each: read whole, or only the rows that are wanted.

A part of `NAME` that begins at row 128 is stored as `NAME@128`. So files that several ranks wrote, each what it held, are read by
any other number of ranks, and none of them reads more than it will hold.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from minimind_train.sharding import is_sharded, own_rows

__all__ = ["StoredTensors", "to_be_stored"]

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
