"""What a build is to make: its options, the splits and their names.

Everything here follows from the inputs and the options alone, so any number of machines plan the same build.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from minimind_data.build.split import SplitTask
from minimind_data.chat.encoding import ChatEncoding
from minimind_data.chat.loss_mask import find_answer_marks
from minimind_data.chat.rendering import ChatOptions, RenderSpec, parse_share
from minimind_data.chat.template import ChatTemplate
from minimind_data.dataset.format import TEMPLATE_NAME, TOKENIZER_CONFIG_NAME, Kind
from minimind_data.dataset.staging import unique_names
from minimind_data.errors import UserError
from minimind_data.inputs.discovery import stem_of
from minimind_data.inputs.forms import (
    AUTO,
    FORMS,
    WITH_CONVERSATIONS,
    FormChoice,
    form_of,
    titles,
)
from minimind_data.inputs.sources import Source
from minimind_data.inputs.spec import RecordSpec
from minimind_data.inputs.splits import open_reader, plan_splits
from minimind_data.options import KnowsPassed, as_paths, parse_size
from minimind_data.tokenizer.backends import Backend
from minimind_data.tokenizer.loading import BosToken, EosToken, PadToken, Tokenizer

_MIN_SPLIT_BYTES = 1024

_SAMPLE_SPLITS = 4
_SAMPLE_TEXTS_PER_SPLIT = 8
_SAMPLE_MAX_CHARS = 2**14


def _read_with(option: str) -> str:
    """Return the titles of the forms whose texts this option of `RecordSpec` decides."""
    return titles(lambda form: option in form.record_options)


def parse_slice(text: str | tuple[int, int]) -> tuple[int, int]:
    """Read I/N, the I-th of N slices, counted from 1.

    Raises:
        ValueError: the text is something else.
    """
    if isinstance(text, tuple):
        return text
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(f"{text!r} is not a slice; write I/N, such as 1/8 to 8/8")
    return int(number), int(count)


def parse_fraction(text: str | float) -> float:
    """Read a number that is at least 0 and less than 1.

    Raises:
        ValueError: the text is something else.
    """
    try:
        fraction = float(text)
    except ValueError:
        fraction = -1.0
    if not 0 <= fraction < 1:
        raise ValueError(f"{text!r} is not a fraction; write one of at least 0 and less than 1, such as 0.01")
    return fraction


@dataclass(frozen=True, kw_only=True)
class TokenizeOptions(KnowsPassed):
    """How text becomes shards.

    Where a dataset is in `out` already, the options that shape it and are not passed are those that it was made with.
    """

    out: Annotated[Path, "Folder of the dataset."] = Path("data")
    tokenizer: Annotated[
        Path | None,
        "A tokenizer.json or its folder; minimind3, minimind2 or default, which ship with this program; or the id of a "
        "model on Hugging Face that has been fetched. By default minimind3.",
    ] = None
    kind: Annotated[
        Kind,
        "What the records are: texts (pretrain), conversations (sft), or pairs of them, chosen and rejected (dpo).",
    ] = "pretrain"
    format: Annotated[FormChoice, "Format of the inputs; auto detects it from content and name."] = AUTO
    records: RecordSpec = field(default_factory=RecordSpec)
    chat: ChatOptions = field(default_factory=ChatOptions)
    val_fraction: Annotated[
        float,
        "Share of the documents, chosen by a hash of their text, that goes to DIR/val for validation.",
        parse_fraction,
    ] = 0.0
    dedup: Annotated[
        Literal["none", "exact"], "exact keeps only the first of several documents with the same text."
    ] = "none"
    workers: Annotated[int, "CPU cores to use, with `engine` ray in the whole cluster; 0 uses all."] = 0
    split_bytes: Annotated[int, "Bytes of input for one shard.", parse_size] = 64 * 2**20
    engine: Annotated[
        Literal["local", "ray"], "Where to tokenize: on this machine, or on the Ray cluster of RAY_ADDRESS."
    ] = "local"
    task: Annotated[
        tuple[int, int] | None, "I/N: make only slice I of N; `mm-data commit` joins them.", parse_slice
    ] = None
    on_bad_record: Annotated[
        Literal["stop", "set-aside"], "Stop at a bad record, or write it to set-aside.jsonl and continue."
    ] = "stop"
    max_bad_share: Annotated[
        float,
        "With `on_bad_record` set-aside, stop where more than this share of the records is bad; 1 never stops.",
        parse_share,
    ] = 0.5
    on_removed_input: Annotated[
        Literal["stop", "drop"],
        "Stop if the dataset has inputs that are no longer named, or drop their documents.",
    ] = "stop"
    backend: Annotated[Backend, "Encoder; auto uses the fastest one that proves exact."] = "auto"
    bos_token: BosToken = None
    eos_token: EosToken = None
    pad_token: PadToken = None

    def __post_init__(self) -> None:
        as_paths(self, "out", "tokenizer")
        if self.workers < 0:
            raise ValueError(f"`workers` must be 0 (all cores) or more, not {self.workers}")
        if self.split_bytes < _MIN_SPLIT_BYTES:
            raise ValueError(f"`split_bytes` must be at least {_MIN_SPLIT_BYTES}, not {self.split_bytes}")
        parse_fraction(self.val_fraction)
        parse_share(self.max_bad_share)
        if self.format not in (AUTO, *FORMS):
            raise ValueError(f"`format` must be {AUTO}, {', '.join(FORMS)}, not {self.format!r}")
        readable = (AUTO, *(name for name, form in FORMS.items() if "separator" in form.record_options))
        if self.records.separator is not None and self.format not in readable:
            raise ValueError(
                f"`separator` is for {_read_with('separator')}, it does nothing with `format` {self.format}"
            )
        self._check_kind()

    def _check_kind(self) -> None:
        if self.kind == "pretrain":
            if self.chat.shaping != ChatOptions().shaping:
                raise ValueError(
                    "`allow_special_in_content`, `empty_think_ratio` and `chat_date` are for conversations; they do nothing with "
                    "`kind` pretrain"
                )
            return
        plain = RecordSpec(max_word_chars=self.records.max_word_chars)
        if self.records != plain:
            raise ValueError(
                f"`field`, `template` and `separator` are for texts; `kind` {self.kind} has fields of its own"
            )
        if self.format != AUTO and not FORMS[self.format].holds_conversations:
            raise ValueError(f"`kind` {self.kind} reads {WITH_CONVERSATIONS}, not {FORMS[self.format].title}")


def plan_tasks(sources: Sequence[Source], options: TokenizeOptions) -> list[SplitTask]:
    """Return a task for every split of every source, with a name that no other one has: that of its source, and a number."""
    prefixes = unique_names([stem_of(source) for source in sources])
    planned = plan_splits(sources, options.split_bytes, options.records, options.kind)
    return [
        SplitTask(name=f"{prefix}-{index:05d}", input=number, split=split)
        for number, (prefix, splits) in enumerate(zip(prefixes, planned, strict=True))
        for index, split in enumerate(splits)
    ]


def idle_options(sources: Sequence[Source], records: RecordSpec) -> list[str]:
    """Return a sentence for each option that does nothing, because no input has the form that it is for."""
    idle = []
    for name in ("field", "template", "separator"):
        if getattr(records, name) == getattr(RecordSpec(), name):
            continue
        if not any(name in FORMS[source.form].record_options for source in sources):
            idle.append(f"`{name}` does nothing: it is for {_read_with(name)}, and no input is that")
    return idle


def slice_of(tasks: list[SplitTask], part: tuple[int, int] | None) -> list[SplitTask]:
    """Return the tasks of one slice, every N-th; all where there are no slices."""
    return tasks if part is None else tasks[part[0] - 1 :: part[1]]


def chat_encoding_of(
    options: TokenizeOptions, tokenizer: Tokenizer, template: ChatTemplate | None
) -> ChatEncoding | None:
    """Return how conversations become tokens, or None where the records are texts.

    Args:
        options: of the build.
        tokenizer: that encodes them.
        template: its chat template, if it has one.

    Raises:
        UserError: there is no chat template, or it does not show which tokens are answers.
    """
    if options.kind == "pretrain":
        return None
    if template is None:
        raise UserError(
            f"no chat template, neither in {TEMPLATE_NAME} nor in {TOKENIZER_CONFIG_NAME}",
            where=options.tokenizer,
            remedy="name a file with one by `chat_template`",
            option="chat_template",
        )
    if template.is_dated and options.chat.chat_date is None:
        raise UserError(
            "the chat template writes today's date, and a dataset must not depend on the day",
            remedy="pass `chat_date` YYYY-MM-DD",
            option="chat_date",
        )
    return ChatEncoding(
        kind=options.kind,
        rendering=RenderSpec.of(tokenizer, template, options.chat),
        marks=find_answer_marks(tokenizer, template),
    )


def sample_texts(tasks: list[SplitTask], options: TokenizeOptions, chat: ChatEncoding | None) -> list[str]:
    """Return the beginnings of some texts from a few splits, on which encoders are compared; bad records are ignored here."""
    texts: list[str] = []
    step = max(1, len(tasks) // _SAMPLE_SPLITS)
    for task in tasks[::step][:_SAMPLE_SPLITS]:
        split = task.split
        split = form_of(split.source, options.records, options.kind).sample(split, _SAMPLE_MAX_CHARS)
        texts_of_split: list[str] = []
        for block in open_reader(split, options.records, chat).blocks():
            texts_of_split += block.texts
            if len(texts_of_split) >= _SAMPLE_TEXTS_PER_SPLIT:
                break
        texts += [text[:_SAMPLE_MAX_CHARS] for text in texts_of_split[:_SAMPLE_TEXTS_PER_SPLIT]]
    return texts
