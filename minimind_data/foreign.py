r"""The token formats of other projects: what they look like on disk, and how a source is recognised. All little-endian.

`megatron`        Megatron-LM's IndexedDataset, a pair NAME.bin and NAME.idx. `format.py` has the layout, which is ours. Theirs
                  also has the dtype codes 1 uint8, 2 int8, 3 int16, 5 int64 (6 and 7 are floating point), several sequences
                  in a document, and, where it is multimodal, S more bytes at the end of the index.
`nanogpt`         A .bin of uint16 ids, nothing else; one id (GPT-2's <|endoftext|>) stands behind each document.
`llmc`            llm.c's .bin: 256 int32, of which [0] is 20240520, [1] is 1 and [2] the number of tokens; then uint16 ids. The
                  end-of-text id stands before each document, and a document may go on in the next file. modded-nanogpt's
                  files are the same.
`llmc-llama3`     The same with 20240801, 7, and uint32 ids.
`datatrove`       NAME.ds, ids of 2 or 4 bytes; NAME.ds.index, uint64, the token at which each document ends;
                  NAME.ds.metadata, text: `tokenizer|2` (the bytes of an id), the number of tokens, that number for people.
`hf`              The folder that `Dataset.save_to_disk` of Hugging Face datasets makes: data-*.arrow, each an Arrow IPC
                  stream, in the order of `_data_files` in state.json, and dataset_info.json. A row is a document, its ids
                  are in a list column.
`parquet`         Parquet files with such a column.

Sources: Megatron-LM megatron/core/datasets/indexed_dataset.py (`DType`, `_IndexWriter`, `_IndexReader`); nanoGPT
data/openwebtext/prepare.py; llm.c dev/data/data_common.py (`write_datafile`), dev/data/fineweb.py and llmc/dataloader.h;
modded-nanogpt data/fineweb.py and train_gpt.py (`_load_data_shard`); datatrove src/datatrove/pipeline/tokens/tokenizer.py
(`TokenizedFile`); datasets src/datasets/arrow_dataset.py (`save_to_disk`, `load_from_disk`); the Arrow IPC and Parquet formats.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from minimind_data.errors import UserError
from minimind_data.format import INDEX_MAGIC, MANIFEST_NAME

ForeignFormat = Literal["megatron", "nanogpt", "llmc", "llmc-llama3", "datatrove", "hf", "parquet"]
FOREIGN_FORMATS: tuple[ForeignFormat, ...] = get_args(ForeignFormat)
SHARDS = "shards"

HF_INFO_NAME, HF_STATE_NAME, HF_SPLITS_NAME = "dataset_info.json", "state.json", "dataset_dict.json"
_PARQUET_MAGIC = b"PAR1"


@dataclass(frozen=True, kw_only=True)
class StreamHeader:
    """The header of a stream of tokens; nanoGPT has none."""

    magic: int
    version: int
    token_bytes: int
    """Bytes of an id, an unsigned integer."""

    NUM_BYTES = 1024

    def pack(self, num_tokens: int) -> bytes:
        """Return the header of a file that holds this many tokens."""
        return struct.pack("<3i", self.magic, self.version, num_tokens).ljust(self.NUM_BYTES, b"\0")


STREAM_HEADERS: dict[str, StreamHeader] = {
    "llmc": StreamHeader(magic=20240520, version=1, token_bytes=2),
    "llmc-llama3": StreamHeader(magic=20240801, version=7, token_bytes=4),
}
MAX_STREAM_TOKENS = 2**31 - 1
"""What the token count in such a header can say."""
STREAMS = ("nanogpt", *STREAM_HEADERS)
_SUFFIXES = {"megatron": ".bin", "datatrove": ".ds", "parquet": ".parquet"} | dict.fromkeys(STREAMS, ".bin")


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files of a foreign dataset."""

    format: ForeignFormat
    token_files: tuple[Path, ...]
    """In the order of the dataset: by name, or as state.json has them."""
    side_files: tuple[Path, ...]
    """The indexes, which tell where documents begin and so decide the tokens too."""


def detect(source: Path) -> str:
    """Tell by its content what format a source is in: `shards` or one of `FOREIGN_FORMATS`.

    Raises:
        UserError: there is nothing there, or nothing that says what it is.
    """
    if not source.exists() and not source.with_name(source.name + ".idx").exists():
        raise UserError(f"{source}: no such file or folder")
    if source.is_dir():
        if (source / MANIFEST_NAME).exists():
            return SHARDS
        if (source / HF_STATE_NAME).exists() or (source / HF_SPLITS_NAME).exists():
            return "hf"
        files = sorted(path for path in source.iterdir() if path.is_file())
    else:
        files = [source] if source.exists() else [source.with_name(source.name + ".idx")]
    found = {kind for path in files if (kind := _kind_of(path))}
    if len(found) == 1:
        return found.pop()
    if found:
        raise UserError(
            f"{source}: holds files of several formats ({', '.join(sorted(found))}); say which with --from"
        )
    raise UserError(
        f"{source}: nothing in it says what format it is in; nanoGPT's .bin has no header, so say --from nanogpt if it is that"
    )


def _kind_of(path: Path) -> str | None:
    """Tell the format of one file, None where its content says nothing."""
    with path.open("rb") as file:
        start = file.read(16)
    if start.startswith(INDEX_MAGIC):
        return "megatron"
    if path.suffix == ".bin" and _starts_with(path.with_suffix(".idx"), INDEX_MAGIC):
        return "megatron"
    if start.startswith(_PARQUET_MAGIC):
        return "parquet"
    if path.suffix == ".ds" and path.with_name(f"{path.name}.index").exists():
        return "datatrove"
    for name, header in STREAM_HEADERS.items():
        if start.startswith(struct.pack("<2i", header.magic, header.version)):
            return name
    return None


def _starts_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except FileNotFoundError:
        return False


def open_source(source: Path, kind: ForeignFormat) -> Source:
    """Find the files of a foreign dataset.

    Args:
        source: a folder, or one file of it; for Megatron also the common start of .bin and .idx, as its own tools want it.
        kind: its format.

    Raises:
        UserError: there are none, or one of a pair is missing.
    """
    if kind == "hf":
        return Source(format=kind, token_files=_hf_files(source), side_files=())
    suffix = _SUFFIXES[kind]
    if source.is_dir():
        files = tuple(sorted(path for path in source.iterdir() if path.suffix == suffix and path.is_file()))
        if not files:
            raise UserError(f"{source}: no {suffix} file in it, which --from {kind} looks for")
    elif kind == "megatron":
        stem = source.with_suffix("") if source.suffix in {".bin", ".idx"} else source
        files = (stem.with_name(f"{stem.name}.bin"),)
    else:
        files = (source,)
    sides: tuple[Path, ...] = ()
    if kind == "megatron":
        sides = tuple(path.with_suffix(".idx") for path in files)
    elif kind == "datatrove":
        sides = tuple(path.with_name(f"{path.name}.index") for path in files)
    for path in (*files, *sides):
        if not path.is_file():
            raise UserError(f"{path}: no such file; {kind} needs it{_WITHOUT.get(kind, '')}")
    return Source(format=kind, token_files=files, side_files=sides)


_WITHOUT = {
    "megatron": ", an .idx beside every .bin",
    "datatrove": ", an .index beside every .ds (a DocumentTokenizer with save_index=True writes it)",
}


def _hf_files(source: Path) -> tuple[Path, ...]:
    """Return the Arrow files of a saved dataset, or one that was named."""
    if source.is_file():
        return (source,)
    if (source / HF_SPLITS_NAME).is_file():
        splits = _read_json(source / HF_SPLITS_NAME).get("splits", [])
        some = ", ".join(str(source / name) for name in splits)
        raise UserError(f"{source}: holds several splits; name one of them: {some}")
    state = _read_json(source / HF_STATE_NAME)
    if state.get("_indices_data_files"):
        raise UserError(
            f"{source}: its rows are chosen by an index of their own; in datasets, call flatten_indices() and save it again"
        )
    try:
        files = tuple(source / str(entry["filename"]) for entry in state["_data_files"])
    except (KeyError, TypeError):
        raise UserError(
            f"{source / HF_STATE_NAME}: does not name the data files; save the dataset again"
        ) from None
    if missing := [path for path in files if not path.is_file()]:
        raise UserError(f"{missing[0]}: missing, though {HF_STATE_NAME} names it; save the dataset again")
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; `Dataset.save_to_disk` of Hugging Face datasets makes it"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; save the dataset again")
    return content
