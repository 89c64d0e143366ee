"""Seeds that are derived from others: one for a part of a mixture, for an epoch's block, for the dropout of a step.

How they are derived decides the order of samples, so it is part of the format: golden values in the tests pin it. Nothing here draws a
random number.
"""

from minimind_data.hashing import hash_text

__all__ = ["derive_seed"]


def derive_seed(*keys: int | str) -> int:
    """Return a seed of 64 bits from several keys: the first 8 bytes, little-endian, of the BLAKE2b of `KEY/KEY/…`.

    Keys are hashed and not added, so seed 0 of step 1 has nothing to do with seed 1 of step 0.
    """
    return hash_text("/".join(map(str, keys)))
