"""Inputs as splits, and splits as texts, whatever their form."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from minimind_data.chat.encoding import ChatEncoding
from minimind_data.chat.rendering import RenderSpec
from minimind_data.chat.template import chat_template_of
from minimind_data.dataset.format import Kind
from minimind_data.errors import UserError
from minimind_data.inputs.base import RecordReader, Split
from minimind_data.inputs.discovery import find_sources
from minimind_data.inputs.forms import check_forms, form_of
from minimind_data.inputs.sources import Source
from minimind_data.inputs.spec import RecordSpec
from minimind_data.reporting import Say, say_nothing

_BYTES_AT_A_TIME = 16 * 2**20


def plan_splits(
    sources: Sequence[Source], split_bytes: int, spec: RecordSpec, kind: Kind = "pretrain"
) -> list[list[Split]]:
    """Cut sources into splits: a list for each source, empty for one that shares a split with one before it.

    Args:
        sources: what is to be read.
        split_bytes: of a split, about.
        spec: what makes a document of a record, where it is a text.
        kind: what the records are.

    Raises:
        UserError: a source is unreadable.
    """
    splits: list[list[Split]] = []
    for _, neighbours in itertools.groupby(sources, key=lambda source: source.form):
        alike = list(neighbours)
        splits += form_of(alike[0], spec, kind).splits(alike, split_bytes)
    return splits


def open_reader(split: Split, spec: RecordSpec, chat: ChatEncoding | None = None) -> RecordReader:
    """Return the reader of a split; with `chat`, its records are conversations."""
    kind = "pretrain" if chat is None else chat.kind
    return form_of(split.source, spec, kind).reader(split, chat)


def texts_of(
    inputs: Sequence[Path | str],
    spec: RecordSpec | None = None,
    kind: Kind = "pretrain",
    *,
    say: Say = say_nothing,
) -> Iterator[str]:
    """Yield the texts of inputs, in order.

    Args:
        inputs: files, folders, globs and URIs.
        spec: what makes a text of a record; the field `text` unless said.
        kind: what the records are. A conversation's text is what the chat template of tokenizers that are trained here makes of it,
            for that is what such a tokenizer is to encode; of a pair both are texts.
        say: takes sentences about files of a folder that are left out.

    Raises:
        UserError: an input or a record cannot be read.
    """
    spec = spec or RecordSpec()
    sources, notes = find_sources([str(one) for one in inputs])
    for note in notes:
        say(note)
    check_forms(sources, kind, remedy="write its conversations as such")
    chat = _rendered_alone(kind)
    for splits in plan_splits(sources, _BYTES_AT_A_TIME, spec, kind):
        for split in splits:
            for block in open_reader(split, spec, chat).blocks():
                if block.bad:
                    place = form_of(split.source, spec, kind).place(split, block.bad[0].line)
                    raise UserError(block.bad[0].reason, where=place)
                yield from block.texts


def _rendered_alone(kind: Kind) -> ChatEncoding | None:
    """Return how conversations become texts that nobody encodes: special tokens in them need no guard."""
    if kind == "pretrain":
        return None
    template = chat_template_of("default")
    assert template is not None
    return ChatEncoding(kind=kind, rendering=RenderSpec(template=template, control_tokens=()), marks=None)
