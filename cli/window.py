"""`mm-data window`: the ids, the targets and the text of one window, with targets in colour."""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from minimind_data.dataset.format import IGNORED
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.reporting import counted
from minimind_data.tokenizer.loading import load_tokenizer
from minimind_data.tokenizer.token_bytes import TokenBytes, cells_of, token_bytes_of
from minimind_data.windows.base import Layout, LongDocuments
from minimind_data.windows.opening import open_windows
from minimind_train.batches.options import WindowOptions

from .flags import in_flags
from .options import AsJson, OptionsGiven, option_of, refuse_idle

_TARGET, _DIMMED, _PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def window(
    options_given: OptionsGiven,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the dataset.", readable=False)],
    number: Annotated[int, typer.Argument(metavar="K", help="Number of the window, from 0.")],
    seq_len: Annotated[int, option_of(WindowOptions, "seq_len")],
    layout: Annotated[
        Layout | None,
        option_of(WindowOptions, "layout", default="concat; pad for conversations and pairs"),
    ] = None,
    long_documents: Annotated[
        LongDocuments, option_of(WindowOptions, "long_documents")
    ] = WindowOptions.long_documents,
    labels: Annotated[
        bool, typer.Option("--labels", help="Show unshifted labels instead of shifted targets.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show one window: its ids, its targets and its text.

    On a terminal, targets are in colour.
    """
    shards = ShardSet.open(folder)
    layout = layout or ("pad" if shards.manifest.has_masks else "concat")
    refuse_idle(options_given, layout)
    windows = open_windows(
        shards,
        layout=layout,
        seq_len=seq_len,
        labels=labels,
        long_documents=long_documents,
        say=lambda sentence: print(in_flags(sentence), file=sys.stderr),
    )
    if not 0 <= number < len(windows):
        raise UserError(
            f"{folder}: there are windows 0 to {len(windows) - 1} of {seq_len} tokens, not {number}"
        )
    sample = {name: row[0].tolist() for name, row in windows.fetch(np.array([number])).items()}
    shard, offset = windows.locate(number)
    tokenizer = load_tokenizer(folder)
    target_name = "labels" if labels else "targets"
    sides = [name.removesuffix("input_ids") for name in sample if name.endswith("input_ids")]
    texts = {side: tokenizer.decode(sample[f"{side}input_ids"]) for side in sides}
    document_ids = windows.document_ids(number).tolist()
    if as_json:
        text = texts[""] if "" in texts else {side.rstrip("_"): decoded for side, decoded in texts.items()}
        place = {"document_ids": document_ids, "shard": shard, "offset": offset, "text": text}
        print(json.dumps({**sample, **place}, ensure_ascii=False))
        return
    num_targets = sum(target != IGNORED for side in sides for target in sample[f"{side}{target_name}"])
    documents = sorted({document for document in document_ids if document >= 0})
    print(
        f"window {number} of {len(windows):,}: shard {shard}, offset {offset:,}, {num_targets} of {len(sides) * seq_len} positions "
        "are targets"
    )
    print(
        f"documents {documents[0]} to {documents[-1]}; {counted(windows.unused_tokens, 'token')} of the dataset in no window, "
        f"{windows.padding / windows.num_places:.1%} of all positions are PAD"
    )
    for name, ids in sample.items():
        print(f"{name} {' '.join(map(str, ids))}")
    if not _has_colours():
        print("\n".join(texts.values()))
        return
    token_bytes = token_bytes_of(tokenizer)
    print(f"{_TARGET}target{_PLAIN} {_DIMMED}no target{_PLAIN}")
    for side in sides:
        ids, marks = _marked(sample[f"{side}input_ids"], sample[f"{side}{target_name}"], shifted=not labels)
        print("".join(_painted(ids, marks, token_bytes, tokenizer.info.pad_id)))


def _has_colours() -> bool:
    """Tell whether stdout is a terminal and colours are not turned off; see https://no-color.org."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _marked(inputs: list[int], targets: list[int], *, shifted: bool) -> tuple[list[int], list[bool]]:
    """Return the tokens of a window, the last target included if there is one, and whether each is a target."""
    marks = [target != IGNORED for target in targets]
    if not shifted:
        return inputs, marks
    if marks[-1]:
        return [*inputs, targets[-1]], [False, *marks]
    return inputs, [False, *marks[:-1]]


def _painted(ids: list[int], marks: list[bool], token_bytes: TokenBytes, pad_id: int) -> Iterator[str]:
    """Yield the text of tokens, with targets in colour; PAD at the end is only counted."""
    num_tokens = len(ids)
    while num_tokens and ids[num_tokens - 1] == pad_id and not marks[num_tokens - 1]:
        num_tokens -= 1
    colour = ""
    for cell in cells_of(ids[:num_tokens], token_bytes.byte_strings):
        next_colour = _TARGET if marks[cell.first] else _DIMMED
        if next_colour != colour:
            yield f"{_PLAIN if colour else ''}{next_colour}"
            colour = next_colour
        yield _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", cell.text)
    yield _PLAIN
    if num_tokens < len(ids):
        yield f"{_DIMMED} + {len(ids) - num_tokens} PAD{_PLAIN}"
