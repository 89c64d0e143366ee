"""`hf` and `parquet`: tables in which each row is a document, with its ids in a list column. Conversations and pairs also have `labels`.

hf       The folder that `Dataset.save_to_disk` of Hugging Face datasets makes: data-*.arrow, each an Arrow IPC stream, in the order of
         `_data_files` in state.json, and dataset_info.json.
parquet  Parquet files.

Sources: datasets src/datasets/arrow_dataset.py (`save_to_disk`, `load_from_disk`); the Arrow IPC and Parquet formats.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minimind_data.dataset.checked_reading import Documents, checked_sequences
from minimind_data.dataset.format import IGNORED, Kind, Manifest
from minimind_data.dataset.staging import durable_file
from minimind_data.errors import UserError
from minimind_data.files import parse_json
from minimind_data.interchange.base import Batch, Part, ReadOptions, TokenFiles, TokenFormat, WriteOptions
from minimind_data.json_fields import is_file_name

_INFO_NAME, _STATE_NAME, _SPLITS_NAME = "dataset_info.json", "state.json", "dataset_dict.json"
_PARQUET_MAGIC = b"PAR1"


class Table(TokenFormat):
    """Leaves nothing out. Conversations and pairs have `labels` beside the ids: the id where the loss mask is 1, else -100."""

    options = frozenset({"column"})
    takes_conversations = True

    def read(self, files: TokenFiles, options: ReadOptions) -> Iterator[Batch]:
        """See `TokenFormat.read`."""
        from minimind_data.interchange.arrow import read_tables  # noqa: PLC0415 - pyarrow takes a while to load

        for number, num_bytes, tokens, lengths in read_tables(
            files.token_files, options.column, options.vocab_size, options.block_tokens
        ):
            yield Batch(
                input=number,
                start=0,
                stop=files.token_files[number].stat().st_size,
                num_bytes=num_bytes,
                tokens=tokens,
                lengths=lengths,
            )


class HuggingFace(Table):
    """A saved dataset."""

    name = "hf"
    suffix = ".arrow"

    def recognizes_folder(self, folder: Path) -> bool:
        """See `TokenFormat.recognizes_folder`."""
        return (folder / _STATE_NAME).exists() or (folder / _SPLITS_NAME).exists()

    def open(self, source: Path) -> TokenFiles:
        """Find the Arrow files in the order of the saved dataset; `source` may be one of them."""
        files = (source,) if source.is_file() else _saved_files(source)
        return TokenFiles(format=self.name, token_files=files)

    def file_names(self, names: Sequence[str]) -> list[str]:
        """Return the numbered names that datasets gives its files."""
        return [f"data-{number:05d}-of-{len(names):05d}" for number in range(len(names))]

    def write(self, folder: Path, part: Part, options: WriteOptions) -> int:
        """See `TokenFormat.write`."""
        from minimind_data.interchange.arrow import write_arrow  # noqa: PLC0415 - pyarrow takes a while to load

        columns = _columns_of(part.shards.manifest.kind, options.column)
        write_arrow(folder / f"{part.name}{self.suffix}", columns, _rows_of(part), _metadata_of(columns))
        return 0

    def finish(self, folder: Path, manifest: Manifest, files: Sequence[str], options: WriteOptions) -> None:
        """Write state.json and dataset_info.json, so that the folder is a saved dataset."""
        columns = _columns_of(manifest.kind, options.column)
        state: dict[str, Any] = {
            "_data_files": [{"filename": name} for name in files],
            "_fingerprint": manifest.fingerprint[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        info = {
            "citation": "",
            "description": "",
            "features": _features_of(columns),
            "homepage": "",
            "license": "",
        }
        for name, content in ((_STATE_NAME, state), (_INFO_NAME, info)):
            with durable_file(folder / name) as file:
                file.write(json.dumps(content, indent=2, sort_keys=True).encode())


class Parquet(Table):
    """Files of rows."""

    name = "parquet"
    suffix = ".parquet"

    def recognizes(self, path: Path, start: bytes) -> bool:  # noqa: ARG002 - its name does not matter
        """See `TokenFormat.recognizes`."""
        return start.startswith(_PARQUET_MAGIC)

    def write(self, folder: Path, part: Part, options: WriteOptions) -> int:
        """See `TokenFormat.write`."""
        from minimind_data.interchange.arrow import write_parquet  # noqa: PLC0415 - pyarrow takes a while to load

        columns = _columns_of(part.shards.manifest.kind, options.column)
        write_parquet(folder / f"{part.name}{self.suffix}", columns, _rows_of(part), _metadata_of(columns))
        return 0


def _columns_of(kind: Kind, column: str) -> list[str]:
    """Return the columns of a table with documents of this kind; `column` is the name of the ids."""
    if kind == "dpo":
        return [f"{side}_{name}" for side in ("chosen", "rejected") for name in (column, "labels")]
    return [column] if kind == "pretrain" else [column, "labels"]


def _rows_of(part: Part) -> Iterator[list[Documents]]:
    """Yield blocks of bounded size of all documents of a part, in order: for each column of `_columns_of`, tokens and lengths."""
    each = part.shards.manifest.sequences_per_document
    for index in part.members:
        for tokens, lengths, mask in checked_sequences(part.shards, index, part.report):
            columns: list[Documents] = []
            for side in range(each):
                here = np.repeat(np.arange(len(lengths)) % each == side, lengths) if each > 1 else slice(None)
                columns.append((tokens[here], lengths[side::each]))
                if mask is not None:
                    labels = np.where(mask[here], tokens[here].astype(np.int32), IGNORED)
                    columns.append((labels, lengths[side::each]))
            yield columns


def _features_of(columns: Sequence[str]) -> dict[str, Any]:
    """Return the features, in the sense of datasets, of a table with these columns of lists of int32."""
    # `Sequence` is what versions before 4 call the type; later ones still read it
    feature = {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "Sequence"}
    return dict.fromkeys(columns, feature)


def _metadata_of(columns: Sequence[str]) -> dict[str, str]:
    """Return the metadata of a schema in which datasets looks for the features."""
    return {"huggingface": json.dumps({"info": {"features": _features_of(columns)}})}


def _saved_files(source: Path) -> tuple[Path, ...]:
    """Return the Arrow files of a saved dataset, in its order."""
    if (source / _SPLITS_NAME).is_file():
        splits = _read_json(source / _SPLITS_NAME).get("splits")
        names = splits if isinstance(splits, list) else []
        some = ", ".join(str(source / str(name)) for name in names)
        raise UserError("holds several splits", where=source, remedy=f"name one of them: {some}")
    state = _read_json(source / _STATE_NAME)
    if state.get("_indices_data_files"):
        raise UserError(
            "its rows are chosen by an index of their own",
            where=source,
            remedy="in datasets, call flatten_indices() and save it again",
        )
    try:
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError):
        raise UserError(
            "does not name the data files", where=source / _STATE_NAME, remedy="save the dataset again"
        ) from None
    if outside := [name for name in names if not is_file_name(name)]:
        raise UserError(
            f"names {outside[0]!r}, which is no file in this folder",
            where=source / _STATE_NAME,
            remedy="save the dataset again",
        )
    files = tuple(source / name for name in names)
    if missing := [path for path in files if not path.is_file()]:
        raise UserError(
            f"missing, though {_STATE_NAME} names it", where=missing[0], remedy="save the dataset again"
        )
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            "no such file", where=path, remedy="`Dataset.save_to_disk` of Hugging Face datasets makes it"
        ) from None
    except ValueError as error:
        raise UserError(f"not JSON ({error})", where=path) from None
    if not isinstance(content, dict):
        raise UserError("not a JSON object", where=path, remedy="save the dataset again")
    return content
