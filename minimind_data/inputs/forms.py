"""The forms that inputs may have, in one table: how a file of each is recognized, and what reads it.

To add a form, write a subclass of `base.Form` in a module of its own, and add a row here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from minimind_data.dataset.format import Kind
from minimind_data.errors import UserError
from minimind_data.inputs.base import Form
from minimind_data.inputs.jsonl import JsonLines, why_no_lines
from minimind_data.inputs.sources import Source
from minimind_data.inputs.spec import RecordSpec
from minimind_data.inputs.text import SeparatedText, TextFiles


@dataclass(frozen=True, kw_only=True)
class FormEntry:
    """A row of the table."""

    title: str
    """Its name in messages."""
    make: Callable[[RecordSpec, Kind], Form]
    suffixes: tuple[str, ...]
    """Of files' names, before a suffix of compression."""
    magic: bytes = b""
    """The bytes that every file of this form, and no other, begins with; empty if there are none."""
    likely_start: bytes = b""
    """What a file begins with, white space aside, that is taken for this form if its name says nothing."""
    objection: Callable[[bytes], str | None] = lambda _: None
    """Says why a file with this beginning cannot have this form, whatever its name says; None if it can."""
    may_be_compressed: bool = True
    record_options: tuple[str, ...] = ()
    """The fields of `RecordSpec` that apply to this form but not to every form."""
    holds_conversations: bool = True


def _parquet(spec: RecordSpec, kind: Kind) -> Form:
    from minimind_data.inputs.parquet import Parquet  # noqa: PLC0415 - pyarrow takes a tenth of a second

    return Parquet(spec, kind)


def _text(spec: RecordSpec, kind: Kind) -> Form:
    return TextFiles(spec, kind) if spec.separator is None else SeparatedText(spec, kind)


FORMS: dict[str, FormEntry] = {
    "jsonl": FormEntry(
        title="JSON lines",
        make=JsonLines,
        suffixes=(".jsonl", ".ndjson", ".jsonlines", ".json"),
        likely_start=b"{",
        objection=why_no_lines,
        record_options=("field", "template"),
    ),
    "parquet": FormEntry(
        title="Parquet",
        make=_parquet,
        suffixes=(".parquet", ".pq"),
        magic=b"PAR1",
        may_be_compressed=False,
        record_options=("field", "template"),
    ),
    "text": FormEntry(
        title="text",
        make=_text,
        suffixes=(".txt", ".text"),
        record_options=("separator",),
        holds_conversations=False,
    ),
}
"""By name, as in the manifest and in `TokenizeOptions.format`."""

AUTO = "auto"
if TYPE_CHECKING:
    FormChoice = str
else:
    FormChoice = Literal[(AUTO, *FORMS)]
"""What a user can choose for all inputs; `auto` detects the form of each."""


def titles(which: Callable[[FormEntry], bool] = lambda _: True, *, joined_by: str = "and") -> str:
    """Return the titles of those forms for which `which` holds, for a message: `JSON lines and Parquet`."""
    *others, last = [entry.title for entry in FORMS.values() if which(entry)]
    return f"{', '.join(others)} {joined_by} {last}" if others else last


def form_of(source: Source, spec: RecordSpec, kind: Kind = "pretrain") -> Form:
    """Return what cuts a source into splits and reads them.

    Args:
        source: any of this form.
        spec: what makes a text of a record.
        kind: what the records are.
    """
    return FORMS[source.form].make(spec, kind)


WITH_CONVERSATIONS = titles(lambda form: form.holds_conversations)


def check_forms(
    sources: Sequence[Source],
    kind: Kind,
    remedy: str = "write its conversations as such, or say `format` jsonl where they are JSON lines by another name",
) -> None:
    """Check that sources have a form that can hold the records of a kind.

    Args:
        sources: what is to be read.
        kind: what the records are.
        remedy: what to do about a source that cannot.

    Raises:
        UserError: conversations are to be read from a source that can hold texts alone.
    """
    for source in sources:
        form = FORMS[source.form]
        if kind != "pretrain" and not form.holds_conversations:
            raise UserError(
                f"is {form.title}, where `kind` {kind} reads {WITH_CONVERSATIONS}",
                where=source.name,
                remedy=remedy,
                option="kind",
            )
