"""Plain text: documents that a separator ends, or files that are one document each."""

import hashlib
from collections.abc import Generator, Iterator, Sequence

from minimind_data.chat.encoding import ChatEncoding
from minimind_data.dataset.format import Kind
from minimind_data.files import sha256_of_bytes
from minimind_data.inputs.base import Form, RecordReader, Split
from minimind_data.inputs.blocks import BadRecord, Block
from minimind_data.inputs.delimited import BYTE_ORDER_MARK, Delimited, DelimitedReader
from minimind_data.inputs.held_record import HeldRecord, too_long
from minimind_data.inputs.lines import delimiter
from minimind_data.inputs.sources import Source
from minimind_data.inputs.spec import RecordSpec, long_word, no_utf8

_BLOCK_DOCUMENT_BYTES = 2 * 2**20


class SeparatedText(Delimited):
    """Plain text whose documents end with a separator."""

    def __init__(self, spec: RecordSpec, kind: Kind) -> None:
        super().__init__(spec, kind)
        assert spec.separator_bytes is not None
        self.ends = delimiter(spec.separator_bytes)

    def reader(self, split: Split, chat: ChatEncoding | None = None) -> RecordReader:
        """See `Form.reader`; text holds no conversations."""
        assert chat is None
        return SeparatedTexts(split, self._spec, self.ends)


class TextFiles(Form):
    """Plain text files, each one document; small ones share a split."""

    def splits(self, sources: Sequence[Source], split_bytes: int) -> list[list[Split]]:
        """Put files into one split as long as they are below `split_bytes` together; it belongs to the first of them."""
        sizes = [source.stamp()[0] for source in sources]
        splits: list[list[Split]] = [[] for _ in sources]
        for first, stop in _groups(sizes, split_bytes):
            weight = sum(sizes[first:stop])
            splits[first].append(
                Split(
                    source=sources[first],
                    more=tuple(sources[first + 1 : stop]),
                    start=0,
                    stop=weight,
                    num_bytes=weight,
                )
            )
        return splits

    def reader(self, split: Split, chat: ChatEncoding | None = None) -> RecordReader:
        """See `Form.reader`; text holds no conversations."""
        assert chat is None
        return FileTexts(split, self._spec)

    def records_before(self, split: Split) -> int:  # noqa: ARG002 - whichever it is
        """Return 0: a split begins where its file does."""
        return 0

    def place(self, split: Split, number: int) -> str:
        """Return the path of the file with this number in a split."""
        return split.sources[number - 1].name


def _groups(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Yield the [first, stop) of groups of neighbours whose sizes sum up to at most `most`; a larger one is a group alone."""
    first = weight = 0
    for place, size in enumerate(sizes):
        if place > first and weight + size > most:
            yield first, place
            first, weight = place, 0
        weight += size
    if sizes:
        yield first, len(sizes)


class _Texts:
    """Collects plain texts into blocks."""

    def __init__(self, spec: RecordSpec) -> None:
        self._spec = spec
        self._texts: list[str] = []
        self._bad: list[BadRecord] = []
        self._empty_texts = 0

    def add(self, number: int, data: bytes) -> None:
        """Add a text; one of white space alone counts as empty."""
        why = no_utf8(data, "text")
        text = "" if why else data.decode()
        why = why or long_word(text, self._spec.max_word_chars)
        if why:
            self._bad.append(BadRecord(line=number, reason=why, data=data))
        elif not text.strip():
            self._empty_texts += 1
        else:
            self._texts.append(text)

    def add_bad(self, record: BadRecord) -> None:
        """Add a record that makes no text."""
        self._bad.append(record)

    def take(self, num_bytes: int) -> Block:
        """Return what was collected as a block, and begin the next one."""
        block = Block(texts=self._texts, empty_texts=self._empty_texts, bad=self._bad, num_bytes=num_bytes)
        self._texts, self._bad, self._empty_texts = [], [], 0
        return block


class SeparatedTexts(DelimitedReader):
    """Plain text whose documents end with a separator."""

    _long_remedy = "see whether `separator` is what stands between two documents"

    def _block(self, first: int, records: list[bytes], num_bytes: int) -> Block:
        texts = _Texts(self._spec)
        for number, record in enumerate(records, first):
            texts.add(number, record)
        return texts.take(num_bytes)


class FileTexts:
    """Plain text files, each one document."""

    def __init__(self, split: Split, spec: RecordSpec) -> None:
        self._split = split
        self._spec = spec
        self._digests: list[str] = []
        self.begin = self.end = 0
        self.num_lines = 0

    def blocks(self) -> Generator[Block, None, None]:
        """Yield the texts; see `RecordReader`."""
        texts = _Texts(self._spec)
        weight = held_bytes = 0
        for source in self._split.sources:
            record, digest = HeldRecord(), hashlib.sha256()
            with source.reading(), source.open_text() as file:
                while part := file.read(_BLOCK_DOCUMENT_BYTES):
                    digest.update(part)
                    record.add(part)
            self._digests.append(digest.hexdigest())
            self.num_lines += 1
            size = source.stamp()[0]
            self.end += size
            weight += size
            data = record.data()
            held_bytes += len(data)
            if record.is_too_long:
                texts.add_bad(too_long(self.num_lines, data, "cut the file into documents, with `separator`"))
            else:
                texts.add(self.num_lines, data.removeprefix(BYTE_ORDER_MARK))
            if held_bytes >= _BLOCK_DOCUMENT_BYTES:
                yield texts.take(weight)
                weight = held_bytes = 0
        yield texts.take(weight)

    @property
    def sha256(self) -> str:
        """Of the SHA-256s of the files' texts."""
        return sha256_of_bytes("".join(self._digests).encode())
