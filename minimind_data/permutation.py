"""A shuffled order that is computed, not stored: a keyed bijection of range(n).

`Permutation(n, seed, epoch)[i]` is the i-th number of a shuffle of 0 … n-1. It costs microseconds at any i and no memory that
grows with n, so a run can begin anywhere in the order of 10^12 windows, and a dataset of any size can be shuffled piece by piece. It is
a shuffle for training data, no cipher.

An index is split into two halves, `x` in range(2^k) and `y` in range(b), with 2^k · b just above n. A Feistel network adds a
hash of one half to the other, eight times in turn. Every round can be undone, so the network is a bijection of
range(2^k · b); an image outside range(n) is sent through again until it falls inside (cycle walking), which makes it a bijection
of range(n). As b need not be a power of two, fewer than 2^k images lie outside, and walking is rare.

On a small domain a Feistel network is visibly less than uniform. Up to `_TABLE_LIMIT` the permutation is therefore the sort order
of n hashes, where each of the n! is equally likely, in a table of a few KiB.

The order is part of the format: a run is resumed by its position alone, and a shuffled dataset is known by its seed. Golden values in
the tests pin it.
"""

import operator
from functools import cached_property
from typing import Final, overload

import numpy as np
from numpy.typing import NDArray

from minimind_data.hashing import MULTIPLIER_2, STRIDE, mix

__all__ = ["MAX_LENGTH", "MAX_SEED", "Permutation"]

MAX_LENGTH: Final = 2**62
"""The largest n. Both halves of an index then have at most 32 bits, and no sum in a round leaves 64."""

MAX_SEED: Final = 2**64 - 1
"""The largest seed."""

_TABLE_LIMIT: Final = 256
_NUM_ROUNDS: Final = 8
_MAX_UINT64: Final = 2**64 - 1

_MULTIPLIER_3: Final = np.uint64(0xFF51AFD7ED558CCD)
"""One of murmur3's."""
_16, _32 = (np.uint64(bits) for bits in (16, 32))  # numpy is slow to convert Python's integers
_INT_2, _INT_3 = int(MULTIPLIER_2), int(_MULTIPLIER_3)

_UInt64s = NDArray[np.uint64]


def _hash_half(half: _UInt64s, key: np.uint64) -> _UInt64s:
    """A 48-bit hash of one half.

    A product carries upwards only. So the shift between the two products brings high bits down, and the lowest bits of the
    second, which depend on too few, are left out; otherwise the parity of neighbours would show through.
    """
    values = half + key
    values *= _MULTIPLIER_3
    values ^= values >> _32
    values *= MULTIPLIER_2
    values >>= _16
    return values


def _hash_half_int(half: int, key: int) -> int:
    """`_hash_half` of one Python integer."""
    value = ((half + key) * _INT_3) & _MAX_UINT64
    return (((value ^ (value >> 32)) * _INT_2) & _MAX_UINT64) >> 16


class Permutation:
    """The shuffle of range(n) that belongs to a seed and an epoch; indexed by an int or by an array of int64."""

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        self._n, self._seed, self._epoch = operator.index(n), operator.index(seed), operator.index(epoch)
        if not 1 <= self._n <= MAX_LENGTH:
            raise ValueError(f"a permutation needs a length from 1 to 2^62, not {n}")
        for name, value in (("seed", self._seed), ("epoch", self._epoch)):
            if not 0 <= value <= _MAX_UINT64:
                raise ValueError(f"{name} must be from 0 to 2^64 - 1, not {value}")
        # Chained, not added: seed 0 epoch 1 has nothing to do with seed 1 epoch 0, and no two epochs of a seed share a key.
        key = np.zeros(1, np.uint64)
        for number in (self._seed, self._epoch, self._n):
            key = mix((key ^ np.uint64(number)) + STRIDE)
        self._key = key
        self._x_bits = self._n.bit_length() // 2
        self._x_mask = (1 << self._x_bits) - 1
        self._y_size = -(-self._n >> self._x_bits)
        round_keys = self._stream(_NUM_ROUNDS)
        self._keys = list(zip(round_keys[::2], round_keys[1::2], strict=True))
        self._int_keys = [(int(key_y), int(key_x)) for key_y, key_x in self._keys]

    @property
    def seed(self) -> int:
        """The seed it was made from."""
        return self._seed

    @property
    def epoch(self) -> int:
        """The epoch it was made from."""
        return self._epoch

    def __len__(self) -> int:
        return self._n

    def __repr__(self) -> str:
        return f"Permutation(n={self._n}, seed={self._seed}, epoch={self._epoch})"

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: NDArray[np.int64]) -> NDArray[np.int64]: ...

    def __getitem__(self, index: int | NDArray[np.int64]) -> int | NDArray[np.int64]:
        return self._apply(index, inverse=False)

    @overload
    def inverse(self, value: int) -> int: ...
    @overload
    def inverse(self, value: NDArray[np.int64]) -> NDArray[np.int64]: ...

    def inverse(self, value: int | NDArray[np.int64]) -> int | NDArray[np.int64]:
        """The index at which `value` stands: `p.inverse(p[i]) == i`."""
        return self._apply(value, inverse=True)

    def _apply(self, index: int | NDArray[np.int64], *, inverse: bool) -> int | NDArray[np.int64]:
        return (
            self._of_array(index, inverse=inverse)
            if isinstance(index, np.ndarray)
            else self._of_int(operator.index(index), inverse=inverse)
        )

    def _of_int(self, number: int, *, inverse: bool) -> int:
        if not 0 <= number < self._n:
            raise IndexError(f"index {number} is not in range({self._n})")
        if self._n <= _TABLE_LIMIT:
            return int(self._tables[inverse][number])
        network = self._backward_int if inverse else self._forward_int
        number = network(number)
        while number >= self._n:
            number = network(number)
        return number

    def _of_array(self, index: NDArray[np.int64], *, inverse: bool) -> NDArray[np.int64]:
        if not np.issubdtype(index.dtype, np.integer):
            raise TypeError(f"indices must be integers, not {index.dtype}")
        flat = index.reshape(-1)
        if flat.size and (flat.min() < 0 or flat.max() >= self._n):
            raise IndexError(f"indices {flat.min()} to {flat.max()} are not all in range({self._n})")
        if self._n <= _TABLE_LIMIT:
            return self._tables[inverse][flat].reshape(index.shape)
        network = self._backward if inverse else self._forward
        numbers = network(flat.astype(np.uint64))
        (outside,) = np.nonzero(numbers >= self._n)
        while outside.size:
            numbers[outside] = again = network(numbers[outside])
            outside = outside[again >= self._n]
        return numbers.view(np.int64).reshape(index.shape)

    # The network four times: forward and backward, for arrays in place and for single integers, where numpy would take ten times
    # as long. Neighbours i and i+1 differ in x and mostly agree in y. So x is hashed first: a hash of y would leave their
    # difference alone.

    def _forward(self, numbers: _UInt64s) -> _UInt64s:
        x_bits, x_mask, y_size = np.uint64(self._x_bits), np.uint64(self._x_mask), np.uint64(self._y_size)
        x, y = numbers & x_mask, numbers >> x_bits
        for key_y, key_x in self._keys:
            y += _hash_half(x, key_y)
            y %= y_size
            x += _hash_half(y, key_x)
            x &= x_mask
        return (y << x_bits) | x

    def _forward_int(self, number: int) -> int:
        x, y = number & self._x_mask, number >> self._x_bits
        for key_y, key_x in self._int_keys:
            y = (y + _hash_half_int(x, key_y)) % self._y_size
            x = (x + _hash_half_int(y, key_x)) & self._x_mask
        return (y << self._x_bits) | x

    def _backward(self, numbers: _UInt64s) -> _UInt64s:
        x_bits, x_mask, y_size = np.uint64(self._x_bits), np.uint64(self._x_mask), np.uint64(self._y_size)
        x, y = numbers & x_mask, numbers >> x_bits
        for key_y, key_x in reversed(self._keys):
            x -= _hash_half(y, key_x)
            x &= x_mask
            y += y_size  # first, so that the difference is not negative
            y -= _hash_half(x, key_y) % y_size
            y %= y_size
        return (y << x_bits) | x

    def _backward_int(self, number: int) -> int:
        x, y = number & self._x_mask, number >> self._x_bits
        for key_y, key_x in reversed(self._int_keys):
            x = (x - _hash_half_int(y, key_x)) & self._x_mask
            y = (y - _hash_half_int(x, key_y)) % self._y_size
        return (y << self._x_bits) | x

    @cached_property
    def _tables(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The permutation of a small n, and its inverse."""
        forward = np.argsort(self._stream(self._n), kind="stable").astype(np.int64)
        return forward, np.argsort(forward, kind="stable").astype(np.int64)

    def _stream(self, count: int) -> _UInt64s:
        """The first numbers of splitmix64 begun at the key."""
        return mix(self._key + np.arange(1, count + 1, dtype=np.uint64) * STRIDE)
