"""The formats of other projects' token files, in one table, and the detection of the format of a source.

`megatron`                        `megatron`     Megatron-LM's IndexedDataset
`nanogpt`, `llmc`, `llmc-llama3`  `streams`      nanoGPT's .bin; llm.c's and modded-nanogpt's, with a header
`datatrove`                       `datatrove`    the files of datatrove's DocumentTokenizer
`hf`, `parquet`                   `tables`       what Hugging Face datasets saves; Parquet with a column of ids

The docstring of each module specifies its formats, with their sources. To add a format, write a subclass of `base.TokenFormat` in a
module of its own, and add a row here.
"""

from pathlib import Path

from minimind_data.dataset.format import MANIFEST_NAME
from minimind_data.errors import UserError
from minimind_data.interchange.base import TokenFormat
from minimind_data.interchange.datatrove import Datatrove
from minimind_data.interchange.megatron import Megatron
from minimind_data.interchange.streams import LLMC, LLMCLlama3, NanoGPT
from minimind_data.interchange.tables import HuggingFace, Parquet

FORMATS: dict[str, TokenFormat] = {
    token_format.name: token_format
    for token_format in (
        Megatron(),
        NanoGPT(),
        LLMC(),
        LLMCLlama3(),
        Datatrove(),
        HuggingFace(),
        Parquet(),
    )
}

SHARDS = "shards"
"""The name of our own format."""

ALIASES = {"modded-nanogpt": "llmc"}
"""Other names of formats."""

FORMAT_NAMES = (SHARDS, *FORMATS, *ALIASES)

_START_BYTES = 16


def detect(source: Path) -> str:
    """Return the format of a source, judged by its content: `shards` or one of `FORMATS`.

    Raises:
        UserError: there is no such source, or its content does not show its format.
    """
    if source.is_dir():
        if (source / MANIFEST_NAME).exists():
            return SHARDS
        for token_format in FORMATS.values():
            if token_format.recognizes_folder(source):
                return token_format.name
        files = sorted(path for path in source.iterdir() if path.is_file())
    else:
        candidates = (source, *(token_format.file_of(source) for token_format in FORMATS.values()))
        files = [path for path in candidates if path.exists()][:1]
        if not files:
            raise UserError("no such file or folder", where=source)
    names = sorted({name for path in files if (name := _format_of(path)) is not None})
    if len(names) == 1:
        return names[0]
    if names:
        raise UserError(
            f"holds files of several formats ({', '.join(names)})",
            where=source,
            remedy="say which with `source_format`",
        )
    raise UserError(
        "its content does not show its format",
        where=source,
        remedy="nanoGPT's .bin has no header, so say `source_format` nanogpt if it is that",
    )


def _format_of(path: Path) -> str | None:
    """Return the format of one file, None if its content does not show it."""
    with path.open("rb") as file:
        start = file.read(_START_BYTES)
    names = (name for name, token_format in FORMATS.items() if token_format.recognizes(path, start))
    return next(names, None)
