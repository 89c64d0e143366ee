"""write_page(): one HTML file that shows a dataset: its statistics, plots, and windows to browse token by token.

A page opened from a disk can read no other file, so everything is inside it, and the windows are a sample: spread evenly over
each layout, first and last included, and the same every time. The page has a policy that lets it load nothing
and run no script but its own, and its data are JSON in which no `<` occurs, so no text of a dataset can become
part of the page.
"""

import itertools
from pathlib import Path
from typing import Any, get_args

import numpy as np

from minimind_data.dataset.format import IGNORED
from minimind_data.dataset.occupancy import refuse_replacing
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.files import write_atomic
from minimind_data.html import fill, is_page, read_template
from minimind_data.tokenizer.loading import Tokenizer
from minimind_data.tokenizer.token_bytes import TokenBytes, cells_of, token_bytes_of
from minimind_data.windows.base import Layout, Windows
from minimind_data.windows.opening import open_windows
from minimind_data.windows.pad import SIDES

DEFAULT_WINDOWS = 24

_MAX_TOKENS = 400_000
"""Tokens that a page holds at most, about 10 bytes each, unless one window of each kind is more already."""

_TEMPLATE_NAME = "page.html"


def check_page_place(path: Path) -> None:
    """Check that a page can be written there, before the work begins.

    Raises:
        UserError: its folder does not exist, it is a folder itself, or a file of something else would be overwritten.
    """
    if path.is_dir():
        raise UserError("is a folder", where=path, remedy="name a file to write")
    refuse_replacing(path, "html", is_ours=is_page)
    if not path.parent.is_dir():
        raise UserError(
            f"there is no folder {path.parent}", where=path, remedy="make it, or name another place"
        )


def write_page(
    path: Path,
    stats: dict[str, Any],
    shards: ShardSet,
    tokenizer: Tokenizer,
    *,
    num_windows: int = DEFAULT_WINDOWS,
) -> int:
    """Write the page of a dataset, whole or not at all.

    Args:
        path: the file.
        stats: what `Stats.as_dict` returns; its window lengths are those that the page shows.
        shards: the dataset.
        tokenizer: the one that made it.
        num_windows: windows of each layout and length, fewer where the page would become too big for a browser.

    Returns:
        Its size in bytes.
    """
    data = {
        "name": shards.folder.resolve().name,
        **stats,
        **sample_windows(stats, shards, tokenizer, num_windows),
    }
    page = fill(read_template("minimind_data.report", _TEMPLATE_NAME), data)
    # A folder's name that is not UTF-8 holds lone surrogates; as escapes they may stand in the page's JSON.
    content = page.encode(errors="backslashreplace")
    write_atomic(path, content)
    return len(content)


def sample_windows(
    stats: dict[str, Any], shards: ShardSet, tokenizer: Tokenizer, num_windows: int
) -> dict[str, Any]:
    r"""Return windows of every layout and length, and the texts of their tokens.

    Of pairs, `chosen` and `rejected` stand for layouts: the two sides of the same windows.

    Returns:
        `pieces`: text by id, for ids that are whole characters and for those that are not (`\xNN` for each odd byte);
        `broken`: the latter; `special`: ids of added tokens; `pad`: the id of PAD; `views`: for each layout and length the
        sampled windows, see `_window`.
    """
    token_bytes = token_bytes_of(tokenizer)
    kinds = [(layout, seq_len) for seq_len in _seq_lens(stats) for layout in get_args(Layout)]
    tokens_of_one_each = sum(seq_len + 1 for _, seq_len in kinds)
    count = max(1, min(num_windows, _MAX_TOKENS // tokens_of_one_each))
    views: list[dict[str, Any]] = []
    for layout, seq_len in kinds:
        try:
            windows = open_windows(shards, layout=layout, seq_len=seq_len)
        except UserError:  # too little text for one window of this length
            continue
        numbers = np.unique(np.linspace(0, len(windows) - 1, count).round().astype(np.int64))
        views += [
            {
                "layout": side or layout,
                "seq_len": seq_len,
                "of": len(windows),
                "windows": [_window(windows, int(number), token_bytes, side) for number in numbers],
            }
            for side in (SIDES if shards.manifest.kind == "dpo" else ("",))
        ]
    used = sorted({token for view in views for window in view["windows"] for token in window["ids"]})
    alone = {token: cells_of([token], token_bytes.byte_strings)[0] for token in used}
    return {
        "pieces": {str(token): cell.text for token, cell in alone.items()},
        "broken": [token for token, cell in alone.items() if cell.broken],
        "special": [token for token in used if token in token_bytes.special],
        "bos": tokenizer.info.bos_id,
        "eos": tokenizer.info.eos_id,
        "pad": tokenizer.info.pad_id,
        "windows_wanted": num_windows,
        "windows_each": count,
        "views": views,
    }


def _seq_lens(stats: dict[str, Any]) -> list[int]:
    return list(dict.fromkeys(waste["seq_len"] for waste in stats["layouts"]))


def _window(windows: Windows, number: int, token_bytes: TokenBytes, side: str) -> dict[str, Any]:
    """Describe one window for the page, or one side of a pair.

    Returns:
        `ids`: its L inputs, and the token after them where it is a target; `joins`: [first, count, text] of tokens that make
        a character only together; `documents`: [number or -1, count] runs over the inputs; `begins`: whether a
        document begins with the window; `unlearned`: [from, to) spans that are no target here.
    """
    sample = windows.fetch(np.array([number]))
    name = f"{side}_" if side else ""
    inputs, targets = sample[f"{name}input_ids"][0], sample[f"{name}targets"][0]
    last = [] if targets[-1] == IGNORED else [int(targets[-1])]
    ids = [*inputs.tolist(), *last]
    shard_name, offset = windows.locate(number)
    documents = windows.document_ids(number)
    if side:  # what windows of pairs say of their documents is true of the chosen side
        text = np.flatnonzero(inputs != windows.shards.manifest.tokenizer.pad_id)
        documents = np.where(np.arange(len(inputs)) <= text[-1], number, -1)
    shard = windows.shards.shard(windows.shards.index_of(shard_name))
    sequence_start = int(shard.offsets[shard.sequence_of(offset)]) // shard.tokens.itemsize
    unlearned = np.concatenate([[True], targets[:-1] == IGNORED])
    joins = [cell for cell in cells_of(ids, token_bytes.byte_strings) if cell.count > 1]
    return {
        "number": number,
        "shard": shard_name,
        "offset": offset,
        "begins": sequence_start == offset,
        "ids": ids,
        "joins": [[cell.first, cell.count, cell.text] for cell in joins],
        "documents": [[value, stop - start] for value, start, stop in _runs(documents.tolist())],
        "unlearned": [[start, stop] for value, start, stop in _runs(unlearned.tolist()) if value],
        "learned": int(np.count_nonzero(targets != IGNORED)),
    }


def _runs(values: list[Any]) -> list[tuple[Any, int, int]]:
    """Return (value, start, stop) of each run of equal values."""
    borders = [0, *(at for at in range(1, len(values)) if values[at] != values[at - 1]), len(values)]
    return [(values[start], start, stop) for start, stop in itertools.pairwise(borders) if stop > start]
