"""Sparse files as long as a corpus of a terabyte: zeros that take no room."""

from pathlib import Path

_TOKEN_BYTES = 2


def sparse_stream(path: Path, num_tokens: int) -> None:
    """Make a file of this many uint16 tokens, all 0."""
    with path.open("wb") as file:
        file.truncate(num_tokens * _TOKEN_BYTES)
