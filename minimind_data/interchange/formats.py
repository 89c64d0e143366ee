"""The token formats of other projects: what they look like on disk, and how a source is recognised. All little-endian.

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

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from minimind_data.dataset.format import INDEX_MAGIC, MANIFEST_NAME
from minimind_data.errors import UserError
from minimind_data.interchange.batch import Batch, ForeignFormat, Part, ReadOptions, Source, columns_of
from minimind_data.interchange.datatrove import read_datatrove, write_datatrove
from minimind_data.interchange.megatron import place_pair, read_megatron, write_megatron
from minimind_data.interchange.streams import STREAM_HEADERS, STREAMS, read_stream, write_stream
from minimind_data.interchange.tables import HF_SPLITS_NAME, HF_STATE_NAME, hf_files

FOREIGN_FORMATS: tuple[ForeignFormat, ...] = get_args(ForeignFormat)

SHARDS = "shards"

_PARQUET_MAGIC = b"PAR1"

"""What the token count in such a header can say."""

_SUFFIXES = {"megatron": ".bin", "datatrove": ".ds", "parquet": ".parquet"} | dict.fromkeys(STREAMS, ".bin")


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
        return Source(format=kind, token_files=hf_files(source), side_files=())
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


def read(source: Source, options: ReadOptions) -> Iterator[Batch]:
    """Read all documents of a source in order.

    Raises:
        UserError: a file is damaged or not of this format, or an id is not in the vocabulary.
    """
    if source.format in {"hf", "parquet"}:
        from minimind_data.interchange.tables import read_tables  # noqa: PLC0415 - pyarrow takes a while to load

        return (
            Batch(
                input=number,
                start=0,
                stop=source.token_files[number].stat().st_size,
                num_bytes=num_bytes,
                tokens=tokens,
                lengths=lengths,
            )
            for number, num_bytes, tokens, lengths in read_tables(
                source.token_files, options.column, options.vocab_size, options.block_tokens
            )
        )
    if source.format == "megatron":
        return read_megatron(source, options)
    if source.format == "datatrove":
        return read_datatrove(source, options)
    return read_stream(source, options)


TABLES = frozenset({"hf", "parquet"})


def write_part(kind: ForeignFormat, folder: Path, part: Part, column: str, *, copy: bool) -> tuple[str, int]:
    """Write one part.

    Args:
        kind: the format.
        folder: where to.
        part: what.
        column: the name of the ids in Arrow and Parquet.
        copy: Megatron's pairs, which are our shards as they are, are copied and not linked.

    Returns:
        (name of the file with the tokens, number of documents that a reader will take for several).

    Raises:
        FormatError: a shard is damaged.
        UserError: the format cannot hold it.
    """
    if kind in TABLES:
        from minimind_data.interchange.tables import write_arrow, write_parquet  # noqa: PLC0415 - takes a while to load

        name = f"{part.name}.{'arrow' if kind == 'hf' else 'parquet'}"
        columns = columns_of(part.shards.manifest.kind, column)
        (write_arrow if kind == "hf" else write_parquet)(folder / name, columns, part.columns())
        return name, 0
    if kind == "megatron":
        if len(part.members) == 1:
            place_pair(folder, part, copy=copy)
        else:
            write_megatron(folder, part)
        return f"{part.name}.bin", 0
    if kind == "datatrove":
        write_datatrove(folder, part)
        return f"{part.name}.ds", 0
    return f"{part.name}.bin", write_stream(kind, folder / f"{part.name}.bin", part)
