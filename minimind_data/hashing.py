"""Hashes of 64 bits, of numbers and of texts.

Orders, shares and seeds follow from them, and with these the bytes of datasets and the samples of a run. So a hash here never changes:
golden values in the tests pin all three.
"""

import hashlib
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["MULTIPLIER_1", "MULTIPLIER_2", "STRIDE", "belongs_to_share", "hash_text", "mix"]

STRIDE: Final = np.uint64(0x9E3779B97F4A7C15)
"""2^64 divided by the golden ratio, made odd: the stride of splitmix64. Its multiples spread evenly over 64 bits."""

MULTIPLIER_1: Final = np.uint64(0xBF58476D1CE4E5B9)
MULTIPLIER_2: Final = np.uint64(0x94D049BB133111EB)
"""The two multipliers of splitmix64's finaliser."""

_27, _30, _31 = (np.uint64(bits) for bits in (27, 30, 31))  # numpy is slow to convert Python's integers


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the finaliser of splitmix64 (Steele, Lea, Flood 2014) of each value, uint64 of the same shape.

    It is a bijection of 64 bits in which every bit depends on every other.
    """
    values = (values ^ (values >> _30)) * MULTIPLIER_1
    values = (values ^ (values >> _27)) * MULTIPLIER_2
    return values ^ (values >> _31)


def hash_text(text: str, purpose: bytes = b"") -> int:
    """Return the BLAKE2b of a text's UTF-8, 8 bytes read as a little-endian integer.

    Args:
        text: what is hashed.
        purpose: at most 16 bytes; hashes for one purpose have nothing to do with those for another.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=purpose).digest()
    return int.from_bytes(digest, "little")


def belongs_to_share(text: str, share: float, purpose: bytes) -> bool:
    """Tell whether a text is in a share of all texts, by its hash alone: the same text is always on the same side.

    Args:
        text: the text.
        share: of all texts, from 0 to 1.
        purpose: as in `hash_text`, so that two shares are drawn independently.
    """
    return hash_text(text, purpose) < share * 2**64
