"""RowGather: copy rows out of many memory maps in one numpy call.

It knows addresses and offsets, but neither tokens nor files; `shard_set` maps the files and checks the numbers of rows.
"""

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


class RowGather:
    """Copies rows of equal length, which may begin at any element of any of many maps, in one numpy call.

    Every map lies somewhere in this process's address space, at a multiple of the page size. One array spans the addresses from the
    lowest map to the highest with a stride of one element, so that it has a row for every element. Indexing this array with numbers of
    rows copies what a loop over the maps would copy, whether there is one map or three hundred. The caller checks, in whole vectors,
    that every row lies inside a map, and keeps the maps alive.

    A gather never changes; `with_maps` returns a new one. So one thread may read while another maps more.

    Args:
        dtype: of the elements.
        starts: int64 [maps], the address of each map; -1 where a file is not mapped yet.
        stops: int64 [maps], the address after the end of each map, or -1.
    """

    def __init__(self, dtype: np.dtype[Any], starts: NDArray[np.int64], stops: NDArray[np.int64]) -> None:
        self._dtype = dtype
        self._starts = starts
        self._stops = stops
        mapped = starts[starts >= 0]
        self._low = int(mapped.min()) if len(mapped) else 0
        self._first_rows = (starts - self._low) // dtype.itemsize
        self._views: dict[int, NDArray[Any]] = {}

    @classmethod
    def empty(cls, dtype: np.dtype[Any], num_maps: int) -> Self:
        """Return a gather without maps."""
        return cls(dtype, np.full(num_maps, -1, np.int64), np.full(num_maps, -1, np.int64))

    def with_maps(self, maps: dict[int, NDArray[Any]]) -> Self:
        """Return a gather that has these maps too, by their numbers."""
        starts, stops = self._starts.copy(), self._stops.copy()
        for index, array in maps.items():
            starts[index] = array.__array_interface__["data"][0]
            stops[index] = starts[index] + array.nbytes
        return type(self)(self._dtype, starts, stops)

    def rows(self, owners: NDArray[np.intp], offsets: NDArray[np.int64], width: int) -> NDArray[Any]:
        """Return a copy of rows, [B, width]: row b is the `width` elements of map owners[b] from its element offsets[b] on."""
        view = self._views.get(width)
        if view is None:
            view = self._views[width] = self._strided(width)
        gathered: NDArray[Any] = view[self._first_rows[owners] + offsets]
        return gathered

    def _strided(self, width: int) -> NDArray[Any]:
        num_elements = (int(self._stops.max()) - self._low) // self._dtype.itemsize
        return np.asarray(_Span(self._low, (num_elements, width), self._dtype))


class _Span:
    """A span of this process's memory as numpy's array interface describes it: an array with a row from every element on."""

    def __init__(self, address: int, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (address, True),
            "typestr": dtype.str,
            "shape": shape,
            "strides": (dtype.itemsize, dtype.itemsize),
        }
