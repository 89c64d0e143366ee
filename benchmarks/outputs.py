"""What each tool wrote, read by our own code: documents of tokens, and how two sets of documents differ.

The readers follow the formats and use none of the libraries: Megatron-Core's .bin and .idx, datatrove's .ds and .ds.index, dolma's raw
.npy and .csv.gz, LitData's chunks, MosaicML's MDS shards, and an Arrow column.
"""

import csv
import gzip
import itertools
import json
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from minimind_data.dataset.format import MANIFEST_NAME


@dataclass(frozen=True)
class Documents:
    """Tokens end to end, and where documents begin: document i is ids[offsets[i]:offsets[i + 1]]."""

    ids: NDArray[np.uint32]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def as_bytes(self) -> list[bytes]:
        """Return the tokens of each document as bytes, four for each token."""
        return [self.ids[start:stop].tobytes() for start, stop in itertools.pairwise(self.offsets.tolist())]


@dataclass(frozen=True)
class Frame:
    """The tokens that a tool puts around a text."""

    before: int | None = None
    behind: int | None = None
    unless_there: bool = False
    """None is put where the text itself begins or ends with it."""

    def put(self, ids: bytes) -> bytes:
        """Return the tokens of a text in their frame."""
        before, behind = (
            b"" if one is None else struct.pack("<I", one) for one in (self.before, self.behind)
        )
        if not self.unless_there or not ids.startswith(before):
            ids = before + ids
        return ids if self.unless_there and ids.endswith(behind) else ids + behind

    def take(self, ids: bytes) -> bytes:
        """Return the tokens of a framed text without the frame.

        Raises:
            ValueError: the frame is missing.
        """
        before, behind = (
            b"" if one is None else struct.pack("<I", one) for one in (self.before, self.behind)
        )
        if not ids.startswith(before) or not ids.endswith(behind) or len(ids) < len(before + behind):
            raise ValueError("a document lacks the tokens round its text")
        return ids[len(before) : len(ids) - len(behind)]


@dataclass(frozen=True)
class Comparison:
    """How one set of documents differs from the reference."""

    total: int
    missing: int
    """Documents of the reference that are not there, token for token."""
    extra: int
    """Documents that the reference does not have."""
    same_order: bool

    def __str__(self) -> str:
        if self.missing or self.extra:
            lost = max(0, self.missing - self.extra)
            return f"{self.missing:,} of {self.total:,} documents differ" + (
                f", {lost:,} of them missing" if lost else ""
            )
        return "yes" if self.same_order else "yes, in another order"


def compare(texts: list[bytes], documents: list[bytes], frame: Frame) -> Comparison:
    """Compare document by document; documents without any text are ignored on both sides.

    Args:
        texts: the reference: the tokens of each text, without a frame.
        documents: of the tool, with `frame`.
        frame: is put around the texts of the reference before they are compared.
    """
    reference = [frame.put(text) for text in texts if text]
    empty = {b"", frame.put(b"")}
    documents = [document for document in documents if document not in empty]
    left, right = Counter(reference), Counter(documents)
    return Comparison(
        total=len(reference),
        missing=(left - right).total(),
        extra=(right - left).total(),
        same_order=reference == documents,
    )


def read_ours(folder: Path) -> Documents:
    """Read a dataset of mm-data."""
    shards = json.loads((folder / MANIFEST_NAME).read_bytes())["shards"]
    return _joined([_megatron(folder / shard["name"]) for shard in shards])


def read_megatron(folder: Path) -> Documents:
    """Read the output of an IndexedDatasetBuilder."""
    return _megatron(folder / "text_document")


def read_plain(folder: Path) -> Documents:
    """Read tokens.bin and lengths.bin of peers/run_tokenizers.py."""
    ids = np.fromfile(folder / "tokens.bin", "<u2")
    return _from_lengths(ids, np.fromfile(folder / "lengths.bin", "<i4"))


def read_datatrove(folder: Path) -> Documents:
    """Read files of uint16, with the ends of their documents, in tokens, as u64."""
    parts = []
    for path in sorted((folder / "tokens").glob("*.ds")):
        ends = np.fromfile(path.with_name(f"{path.name}.index"), "<u8").astype(np.int64)
        parts.append(_from_ends(np.fromfile(path, "<u2"), ends))
    return _joined(parts)


def read_dolma(folder: Path) -> Documents:
    """Read arrays of uint16 (raw, in spite of the name .npy) and their tables: start, end, id, source, line."""
    parts = []
    for path in sorted((folder / "tokens").glob("*.npy")):
        with gzip.open(path.with_suffix(".csv.gz"), "rt", encoding="utf-8", newline="") as table:
            ends = np.array([int(row[1]) for row in csv.reader(table)], np.int64)
        ids = np.fromfile(path, "<u2")
        parts.append(_from_ends(ids[: ends[-1]] if len(ends) else ids[:0], ends))
    return _joined(parts)


def read_litdata(folder: Path) -> Documents:
    """Read chunks: u32 count n, (n + 1) x u32 byte offsets, then the tokens of the items as uint16, without gaps."""
    index = json.loads((folder / "chunks" / "index.json").read_bytes())
    assert index["config"]["data_format"] == ["no_header_tensor:20"], "20 is uint16"
    parts = []
    for chunk in sorted(index["chunks"], key=lambda chunk: _numbers(chunk["filename"])):
        data = (folder / "chunks" / chunk["filename"]).read_bytes()
        (count,) = struct.unpack_from("<I", data)
        offsets = np.frombuffer(data, "<u4", count + 1, 4).astype(np.int64)
        parts.append(_from_ends(np.frombuffer(data, "<u2", -1, offsets[0]), (offsets[1:] - offsets[0]) // 2))
    return _joined(parts)


def read_mds(folder: Path) -> Documents:
    """Read MDS shards with one column `ndarray:uint16`.

    A shard is u32 count n, (n + 1) x u32 byte offsets, a header, then samples. Here a sample is u32 size, one byte whose low two bits
    give the width of the next field, the number of tokens in 1, 2, 4 or 8 bytes, and the tokens.
    """
    items, lengths = [], []
    for shard in json.loads((folder / "mds" / "index.json").read_bytes())["shards"]:
        data = (folder / "mds" / shard["raw_data"]["basename"]).read_bytes()
        (count,) = struct.unpack_from("<I", data)
        for start, stop in itertools.pairwise(np.frombuffer(data, "<u4", count + 1, 4).tolist()):
            begin = start + 5 + (1 << (data[start + 4] & 3))
            items.append(data[begin:stop])
            lengths.append((stop - begin) // 2)
    return _from_lengths(np.frombuffer(b"".join(items), "<u2"), np.array(lengths, np.int64))


def read_arrow(folder: Path) -> Documents:
    """Read the column `input_ids` of a dataset saved by `datasets`."""
    parts = []
    for entry in json.loads((folder / "arrow" / "state.json").read_bytes())["_data_files"]:
        with pa.memory_map(str(folder / "arrow" / entry["filename"])) as file:
            for batch in pa.ipc.open_stream(file):
                column = batch.column("input_ids")
                offsets = column.offsets.to_numpy().astype(np.int64)
                ids = column.values.to_numpy()[offsets[0] : offsets[-1]]
                parts.append(_from_ends(ids, offsets[1:] - offsets[0]))
    return _joined(parts)


def _megatron(prefix: Path) -> Documents:
    index = prefix.with_name(f"{prefix.name}.idx").read_bytes()
    magic, version, code, sequences, _ = struct.unpack_from("<9sQBQQ", index)
    assert (magic, version) == (b"MMIDIDX\x00\x00", 1)
    lengths = np.frombuffer(index, "<i4", sequences, 34)
    return _from_lengths(
        np.fromfile(prefix.with_name(f"{prefix.name}.bin"), {8: "<u2", 4: "<i4"}[code]), lengths
    )


def _numbers(name: str) -> list[int]:
    """Return the numbers in the name chunk-RANK-INDEX.bin."""
    return [int(part) for part in Path(name).stem.split("-") if part.isdigit()]


def _from_lengths(ids: NDArray[np.integer], lengths: NDArray[np.integer]) -> Documents:
    return _from_ends(ids, np.cumsum(lengths, dtype=np.int64))


def _from_ends(ids: NDArray[np.integer], ends: NDArray[np.int64]) -> Documents:
    offsets = np.concatenate([np.zeros(1, np.int64), ends])
    if offsets[-1] != len(ids):
        raise ValueError(f"its documents end at token {offsets[-1]:,}, its file at {len(ids):,}")
    return Documents(ids.astype(np.uint32), offsets)


def _joined(parts: list[Documents]) -> Documents:
    starts = np.cumsum([0, *(len(part.ids) for part in parts)])
    offsets = [part.offsets[1:] + start for part, start in zip(parts, starts, strict=False)]
    return Documents(
        np.concatenate([np.empty(0, np.uint32), *(part.ids for part in parts)]),
        np.concatenate([np.zeros(1, np.int64), *offsets]),
    )
