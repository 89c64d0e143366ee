"""`datatrove`: the files of datatrove's DocumentTokenizer, little-endian.

NAME.ds           ids of 2 or 4 bytes
NAME.ds.index     uint64, the token at which each document ends
NAME.ds.metadata  text: `tokenizer|2` (the bytes of an id), the number of tokens, that number for people

Source: datatrove src/datatrove/pipeline/tokens/tokenizer.py (`TokenizedFile`).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from minimind_data.dataset.format import TOKENIZER_NAME
from minimind_data.dataset.staging import durable_file
from minimind_data.errors import UserError
from minimind_data.interchange.base import (
    INDEX_BLOCK,
    Batch,
    Part,
    ReadOptions,
    TokenFiles,
    TokenFormat,
    WriteOptions,
    read_array,
    read_documents,
)

_UNITS = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))


class Datatrove(TokenFormat):
    """Leaves nothing out."""

    name = "datatrove"
    suffix = ".ds"
    index_needed = ", an .index beside every .ds (a DocumentTokenizer with save_index=True writes it)"

    def recognizes(self, path: Path, start: bytes) -> bool:  # noqa: ARG002 - ids from the first byte on
        """See `TokenFormat.recognizes`."""
        return path.suffix == self.suffix and self.index_of(path).exists()

    def index_of(self, path: Path) -> Path:
        """Return the .ds.index."""
        return path.with_name(f"{path.name}.index")

    def read(self, files: TokenFiles, options: ReadOptions) -> Iterator[Batch]:
        """See `TokenFormat.read`; a file with a loss mask is refused."""
        for number, (path, index_path) in enumerate(zip(files.token_files, files.index_files, strict=True)):
            if path.with_name(f"{path.name}.loss").exists():
                raise UserError(
                    "a loss mask, which would be lost",
                    where=f"{path}.loss",
                    remedy="move it away to convert the tokens alone",
                )
            size, index_size = path.stat().st_size, index_path.stat().st_size
            num_documents, left_over = divmod(index_size, 8)
            if left_over:
                raise UserError(
                    f"{index_size:,} bytes are no list of 8-byte numbers",
                    where=index_path,
                    remedy="copy it again",
                )
            if not num_documents:
                if size:
                    raise UserError(
                        f"{size:,} bytes, but no document in its index", where=path, remedy="make it again"
                    )
                continue
            with index_path.open("rb") as index:
                num_tokens = int(read_array(index, index_path, "<u8", index_size - 8, 1)[0])
                dtype = _dtype(path, size, num_tokens)
                done = 0
                for first in range(0, num_documents, INDEX_BLOCK):
                    count = min(INDEX_BLOCK, num_documents - first)
                    stops = read_array(index, index_path, "<u8", 8 * first, count).astype(np.int64)
                    if (np.diff(stops, prepend=done) < 0).any() or int(stops[-1]) > num_tokens:
                        raise UserError(
                            f"the ends of documents {first:,} to {first + count:,} do not increase from {done:,}",
                            where=index_path,
                            remedy="it is damaged: make it again",
                        )
                    yield from read_documents(
                        path, number, options, dtype=dtype, stops=stops, first_token=done
                    )
                    done = int(stops[-1])

    def write(self, folder: Path, part: Part, options: WriteOptions) -> int:  # noqa: ARG002 - it has none
        """See `TokenFormat.write`."""
        item = part.shards.dtype.itemsize
        done = 0
        path = folder / f"{part.name}.ds"
        with durable_file(path) as file, durable_file(folder / f"{path.name}.index") as index:
            for tokens, lengths in part.documents():
                file.write(tokens.view(np.uint8).data)
                stops = done + np.cumsum(lengths)
                index.write(stops.astype("<u8").tobytes())
                done = int(stops[-1])
        with durable_file(folder / f"{path.name}.metadata") as file:
            file.write(f"{TOKENIZER_NAME}|{item}\n{done}\n{_for_people(done)}T".encode())
        return 0


def _dtype(path: Path, size: int, num_tokens: int) -> str:
    """Return the dtype of the ids, from the sizes of the files; the metadata must agree."""
    token_bytes = size // num_tokens if num_tokens else 2
    if num_tokens * token_bytes != size or token_bytes not in {2, 4}:
        raise UserError(
            f"{size:,} bytes do not hold the {num_tokens:,} tokens of its index in 2 or 4 bytes each",
            where=path,
            remedy="copy both files again",
        )
    try:
        first_line = (
            path.with_name(f"{path.name}.metadata").read_bytes().decode(errors="replace").partition("\n")[0]
        )
    except FileNotFoundError:
        return f"<u{token_bytes}"
    stated = first_line.rpartition("|")[2].strip()
    if num_tokens and stated.isdecimal() and int(stated) != token_bytes:
        raise UserError(
            f"says {stated} bytes a token, where the file and its index say {token_bytes}",
            where=f"{path}.metadata",
            remedy="find out which is right",
        )
    return f"<u{token_bytes}"


def _for_people(number: int) -> str:
    """Write a number with three digits and a unit: 1.23 M."""
    for worth, unit in _UNITS:
        if number >= worth:
            return f"{number / worth:.3g} {unit}"
    return f"{number} "
