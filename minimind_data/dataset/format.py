r"""What a dataset folder holds, byte by byte. This docstring is the specification.

A *dataset* is a folder with shards, a copy of `tokenizer.json`, and one `manifest.json`, which is written last: a folder
without a manifest is not a dataset. All numbers are little-endian. If the tokenizer has a chat template, `tokenizer_config.json` is
there too, with the template and the special tokens that it names.

A *shard* `NAME` is two files in the layout of Megatron-Core's `IndexedDataset`:

    NAME.bin    the tokens of all sequences end to end, nothing else
    NAME.idx    9 bytes   magic "MMIDIDX\0\0"
                u64       version, 1
                u8        dtype code: 8 = uint16 (vocabularies of at most 65,536 entries), 4 = int32
                u64       S, the number of sequences
                u64       D + 1, where D is the number of documents
                S x i32   length of each sequence, in tokens
                S x i64   byte offset of each sequence in NAME.bin
                (D+1) x i64   the sequence index at which each document starts; begins with 0, ends with S

    NAME.mask   conversations and pairs only, the loss mask: a byte for each token of NAME.bin, 1 where the token is learned, else 0

A pre-training document (`pretrain`) is one sequence: BOS + the tokens of its text + EOS, or without BOS where `bos_id` in the manifest is
null. A conversation (`sft`) is one sequence: the tokens of the text that the chat template makes of it, and nothing around them. A pair
(`dpo`) is two such sequences: the chosen conversation, then the rejected one.

`manifest.json` (see `Manifest`) names the tokenizer, the options that shaped the tokens, the inputs, and every shard in
order with its checksums and the bytes of input that it came from. Its *fingerprint* is a hash of everything that determines the
tokens: two datasets with the same fingerprint hold the same tokens in the same order, wherever and however they were built.

Source of the shard layout: Megatron-LM, megatron/core/datasets/indexed_dataset.py (`_IndexWriter`, `_IndexReader`).
"""

import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from minimind_data.errors import UserError
from minimind_data.files import checked_json, checksum_of_json, read_checked
from minimind_data.json_fields import (
    BESIDE,
    MAX_COUNT,
    Count,
    Digest,
    FieldError,
    FileName,
    FiniteJson,
    Rule,
    read_fields,
)
from minimind_data.reporting import counted

FORMAT_VERSION = 1

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"
SET_ASIDE_NAME = "set-aside.jsonl"
"""The bad records that a dataset was made without."""
VALIDATION_NAME = "val"
"""The folder inside that of a dataset that holds its validation part, a dataset too."""

REMAKE = "delete the shard's .bin and .idx and run the same `mm-data tokenize` again: it makes only what is missing"
REMAKE_ALL = f"delete {MANIFEST_NAME} and run the same `mm-data tokenize` again: it makes everything anew"
RENEW = f"get the dataset again, or {REMAKE_ALL}"
RESTORE = "run the same `mm-data tokenize` again: it restores the file"

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
_INDEX_HEADER = struct.Struct("<9sQBQQ")
INDEX_HEADER_BYTES = _INDEX_HEADER.size

MAX_UINT16_VOCABULARY = 65_536
MAX_VOCABULARY = 2**31 - 1
"""The most entries whose ids fit into int32."""

TokenDtype = Literal["uint16", "int32"]
DTYPE_CODES: dict[TokenDtype, int] = {"uint16": 8, "int32": 4}
DTYPES_BY_CODE: dict[int, TokenDtype] = {code: name for name, code in DTYPE_CODES.items()}

TokenArray = NDArray[Any]
"""Tokens as they are on disk: uint16 or int32."""
MaskArray = NDArray[np.uint8]
"""A loss mask: 1 where a token is learned, else 0."""
IGNORED = -100
"""The target of a position that does not count in the loss: the default `ignore_index` of PyTorch's cross entropy."""

Kind = Literal["pretrain", "sft", "dpo"]

_CHECKSUM = "checksum"
_CUT_OPTIONS = {"split_bytes", "shard_bytes"}
"""Options that decide where one shard ends and the next begins, and nothing else."""
_OPTIONAL = (
    "mask_sha256",
    "different_prompts",
    "unlearned",
    "unread",
    "forms",
    "tokenizer_config_sha256",
)
"""Keys that a manifest has only where they are not empty or 0, as the last ones of their object."""


class FormatError(UserError):
    """A file is not what this format requires; the message names it and says what to do."""


def dtype_for(vocab_size: int) -> TokenDtype:
    """Return the narrower of the two token dtypes, where it holds all ids below `vocab_size`."""
    return "uint16" if vocab_size <= MAX_UINT16_VOCABULARY else "int32"


def numpy_dtype(dtype: TokenDtype) -> np.dtype[Any]:
    """Return the little-endian numpy dtype of tokens on disk."""
    return np.dtype(dtype).newbyteorder("<")


def index_size(num_sequences: int, num_documents: int) -> int:
    """Return the size in bytes of the `.idx` file of a shard."""
    return INDEX_HEADER_BYTES + num_sequences * 12 + (num_documents + 1) * 8


@dataclass(frozen=True, kw_only=True)
class IndexHeader:
    """The fixed first 34 bytes of an `.idx` file."""

    dtype: TokenDtype
    num_sequences: int
    num_documents: int

    @property
    def file_bytes(self) -> int:
        """Size of the whole `.idx` file."""
        return index_size(self.num_sequences, self.num_documents)

    def pack(self) -> bytes:
        """Return the bytes of the header."""
        code = DTYPE_CODES[self.dtype]
        return _INDEX_HEADER.pack(
            INDEX_MAGIC, INDEX_VERSION, code, self.num_sequences, self.num_documents + 1
        )

    @classmethod
    def unpack(cls, data: bytes, path: Path) -> Self:
        """Read a header.

        Args:
            data: the beginning of the file.
            path: of the file, for the error.

        Raises:
            FormatError: this version knows no such header.
        """
        if len(data) < INDEX_HEADER_BYTES or not data.startswith(INDEX_MAGIC):
            raise FormatError(
                f"not a shard index (it should begin with {INDEX_MAGIC!r})", where=path, remedy=REMAKE
            )
        _, version, code, num_sequences, num_starts = _INDEX_HEADER.unpack(data[:INDEX_HEADER_BYTES])
        if version != INDEX_VERSION or code not in DTYPES_BY_CODE or num_starts < 1:
            raise FormatError(
                f"the index header says version {version}, dtype code {code}, {num_starts} document starts; this program reads "
                f"version {INDEX_VERSION} with dtype codes {sorted(DTYPES_BY_CODE)}",
                where=path,
                remedy=REMAKE,
            )
        return cls(dtype=DTYPES_BY_CODE[code], num_sequences=num_sequences, num_documents=num_starts - 1)


def index_bytes(header: IndexHeader, lengths: NDArray[np.int64], document_starts: NDArray[np.int64]) -> bytes:
    """Return the bytes of a whole `.idx` file.

    Args:
        header: dtype and counts.
        lengths: int64 [S], the number of tokens of each sequence.
        document_starts: int64 [D+1], the sequence at which each document starts; the last one is S.
    """
    offsets = np.zeros(len(lengths), "<i8")
    np.cumsum(lengths[:-1] * np.dtype(header.dtype).itemsize, out=offsets[1:])
    return b"".join(
        (
            header.pack(),
            lengths.astype("<i4").tobytes(),
            offsets.tobytes(),
            document_starts.astype("<i8").tobytes(),
        )
    )


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """The vocabulary that gives the ids of a dataset their meaning."""

    sha256: Digest
    """SHA-256 of tokenizer.json, in hexadecimal digits as all checksums of a manifest."""
    vocab_size: Annotated[
        int, Rule(f"a number from 1 to {MAX_VOCABULARY:,}", lambda size: 1 <= size <= MAX_VOCABULARY)
    ]
    """The largest id plus one: the rows of an embedding table."""
    bos_id: Count | None
    """None where texts have no token before them."""
    eos_id: Count
    pad_id: Count

    @property
    def summary(self) -> str:
        """Its size and the beginning of its checksum, in a few words."""
        return f"tokenizer of {self.vocab_size:,} entries ({self.sha256[:12]}…)"

    @property
    def special_ids(self) -> tuple[int | None, int, int]:
        """(BOS, EOS, PAD)."""
        return self.bos_id, self.eos_id, self.pad_id

    @property
    def special_ids_in_words(self) -> str:
        """Its BOS, EOS and PAD for people."""
        bos = "no BOS" if self.bos_id is None else f"BOS {self.bos_id}"
        return f"{bos}, EOS {self.eos_id}, PAD {self.pad_id}"


@dataclass(frozen=True, kw_only=True)
class InputEntry:
    """One input file of a dataset."""

    path: str
    """As the user wrote it, without credentials; `-` for standard input."""
    bytes: Count
    """Size of the file as it is stored, compressed or not."""
    sha256: Digest
    form: str = "jsonl"
    """`jsonl`, `parquet` or `text`; for a dataset that was converted, the format that it was converted from."""


def check_name(name: str) -> None:
    """Check that a manifest can hold the name of an input.

    Raises:
        UserError: it cannot, for it is no UTF-8.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(
            "the name is no UTF-8, so a manifest cannot hold it", where=name, remedy="rename the file"
        ) from None


@dataclass(frozen=True, kw_only=True)
class WrittenShard:
    """Counts, sizes and checksums of the files of a shard."""

    documents: Count
    sequences: Count
    tokens: Count
    bytes: Count
    """Size of the .bin file."""
    sha256: Digest
    """SHA-256 of the .bin file."""
    index_sha256: Digest
    """SHA-256 of the .idx file."""
    mask_sha256: Digest = ""
    """SHA-256 of the .mask file; empty where there is none."""

    def file_sizes(self) -> dict[str, int]:
        """Return the size in bytes of each of its files, by suffix."""
        sizes = {".bin": self.bytes, ".idx": index_size(self.sequences, self.documents)}
        return sizes | {".mask": self.tokens} if self.mask_sha256 else sizes


@dataclass(frozen=True, kw_only=True)
class ShardOrigin:
    """The part of the inputs that a shard was made of, and how many of its records made no document."""

    input: Count
    """The index, in the manifest, of the input that the documents came from; of the first one, where small files share a shard."""
    input_start: Count
    """The first byte of this part in the decompressed input; in Parquet, the first row group."""
    input_stop: Count
    """The byte, or the row group, after the last one."""
    input_sha256: Digest
    """SHA-256 of those bytes; in Parquet, of the fields that were read."""
    inputs: Count = 1
    """How many inputs the shard holds, from `input` on."""
    first_line: Count = 0
    """How many records of the input come before this part."""
    lines: Count = 0
    """How many records it has, with those that made no document."""
    empty_texts: Count = 0
    """Records whose text is empty."""
    set_aside: Count = 0
    """Bad records."""
    duplicates: Count = 0
    """Documents with the text of an earlier one."""
    duplicates_sha256: Digest = ""
    """SHA-256 of the numbers of those documents, as little-endian int32; empty where duplicates were kept."""
    different_prompts: Count = 0
    """Pairs whose two conversations do not begin with the same prompt."""
    unlearned: Count = 0
    """Conversations with an answer that is not learned, because its first or last token also covers text around it."""
    unread: dict[str, Count] = field(default_factory=dict)
    """How often each field occurs in the records of the split that nothing reads; in messages, as `messages[].name`."""
    forms: dict[str, Count] = field(default_factory=dict)
    """How many records of the split have a form that is called by a name, such as Alpaca."""


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard: its name, its files, and what they were made of. In `manifest.json` all of that is one flat object."""

    name: FileName
    written: Annotated[WrittenShard, BESIDE]
    origin: Annotated[ShardOrigin, BESIDE]

    def moved_by(self, inputs_before: int) -> Self:
        """Return the entry for a manifest in which so many other inputs come before those of this one."""
        return replace(self, origin=replace(self.origin, input=self.origin.input + inputs_before))

    def to_json(self) -> dict[str, Any]:
        """Return its object in `manifest.json`."""
        return _optional_last({"name": self.name, **asdict(self.written), **asdict(self.origin)})


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Add counts by their names; the highest first."""
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def _optional_last(content: dict[str, Any]) -> dict[str, Any]:
    required = {name: value for name, value in content.items() if name not in _OPTIONAL}
    return required | {name: content[name] for name in _OPTIONAL if content.get(name)}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `manifest.json` says."""

    kind: Kind
    dtype: TokenDtype
    tokenizer: TokenizerInfo
    options: dict[str, FiniteJson]
    """The options that decided the tokens (such as the field the text was in) or where shards end."""
    inputs: tuple[InputEntry, ...]
    shards: tuple[ShardEntry, ...]
    empty_texts: Count = 0
    """Records whose text is empty, which made no document."""
    set_aside: Count = 0
    """Bad records, which made no document."""
    duplicates: Count = 0
    """Documents that were left out because an earlier one has the same text."""
    set_aside_sha256: Digest | None = None
    """SHA-256 of set-aside.jsonl, the file of the bad records; None where there are none."""
    tokenizer_config_sha256: Digest | None = None
    """SHA-256 of tokenizer_config.json; None where the tokenizer has no chat template."""
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """A hash of everything that determines the tokens and their order; paths and the borders of shards do not."""
        content = {
            "format": self.format_version,
            "kind": self.kind,
            "dtype": self.dtype,
            "tokenizer": asdict(self.tokenizer),
            "options": {name: value for name, value in self.options.items() if name not in _CUT_OPTIONS},
            "inputs": [{"bytes": entry.bytes, "sha256": entry.sha256} for entry in self.inputs],
        }
        return checksum_of_json(content)

    @property
    def summary(self) -> str:
        """Its kind, its size and its tokenizer, in one line."""
        return (
            f"{self.kind}, {counted(self.num_documents, 'document')}, {counted(self.num_tokens, 'token')} in "
            f"{counted(len(self.shards), 'shard')} of {self.dtype}, {self.tokenizer.summary}"
        )

    def __repr__(self) -> str:
        return f"Manifest({self.summary}, fingerprint {self.fingerprint[:12]}…)"

    @property
    def has_masks(self) -> bool:
        """Whether the shards have a loss mask."""
        return self.kind != "pretrain"

    @property
    def stores_no_bos(self) -> bool:
        """Whether its documents are texts without BOS; conversations have what their template writes."""
        return self.kind == "pretrain" and self.tokenizer.bos_id is None

    @property
    def sequences_per_document(self) -> int:
        """2 for pairs, else 1."""
        return 2 if self.kind == "dpo" else 1

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards."""
        return sum(entry.written.tokens for entry in self.shards)

    @property
    def num_documents(self) -> int:
        """Documents of all shards."""
        return sum(entry.written.documents for entry in self.shards)

    @property
    def num_bytes(self) -> int:
        """Size of all `.bin` files."""
        return sum(entry.written.bytes for entry in self.shards)

    @property
    def different_prompts(self) -> int:
        """Pairs whose two conversations do not begin with the same prompt."""
        return sum(entry.origin.different_prompts for entry in self.shards)

    @property
    def unlearned(self) -> int:
        """Conversations with an answer that is not learned."""
        return sum(entry.origin.unlearned for entry in self.shards)

    @property
    def unread(self) -> dict[str, int]:
        """How often each field occurs in the records that nothing reads, the most frequent first."""
        return _added(entry.origin.unread for entry in self.shards)

    @property
    def forms(self) -> dict[str, int]:
        """How many records have a form that is called by a name, such as Alpaca, the most frequent first."""
        return _added(entry.origin.forms for entry in self.shards)

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        content = {
            "format_version": self.format_version,
            "fingerprint": self.fingerprint,
            **_optional_last(asdict(self)),
        }
        content["shards"] = [shard.to_json() for shard in self.shards]
        return checked_json(content, key=_CHECKSUM)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the manifest of a dataset.

        Raises:
            FormatError: the folder is not a dataset, or its manifest is damaged or of another version.
        """
        path = folder / MANIFEST_NAME
        try:
            content = read_checked(path, key=_CHECKSUM, remedy=REMAKE_ALL, version=FORMAT_VERSION)
        except (FileNotFoundError, NotADirectoryError):
            raise FormatError(
                f"no dataset (no {MANIFEST_NAME})", where=folder, remedy="make one with `mm-data tokenize`"
            ) from None
        except UserError as error:
            raise FormatError(error.what, where=error.where, remedy=error.remedy) from None
        fingerprint = content.pop("fingerprint", None)
        try:
            manifest = read_fields(cls, content)
        except FieldError as error:
            raise FormatError(f"not a manifest of this program ({error})", where=path, remedy=RENEW) from None
        if contradiction := _contradiction(manifest):
            raise FormatError(f"contradicts itself ({contradiction})", where=path, remedy=RENEW)
        if manifest.fingerprint != fingerprint:
            raise FormatError("its fingerprint does not fit its content", where=path, remedy=REMAKE_ALL)
        return manifest


def _contradiction(manifest: Manifest) -> str | None:
    """Return a clause on two facts that cannot both be true of a dataset, or None."""
    info = manifest.tokenizer
    if any(token_id is not None and token_id >= info.vocab_size for token_id in info.special_ids):
        return f"{info.special_ids_in_words} in a vocabulary of {info.vocab_size:,}"
    item = numpy_dtype(manifest.dtype).itemsize
    names: set[str] = set()
    for shard in manifest.shards:
        written, origin = shard.written, shard.origin
        if shard.name in names:
            return f"two shards are called {shard.name!r}"
        names.add(shard.name)
        if written.bytes != item * written.tokens:
            return (
                f"shard {shard.name} has {written.tokens:,} tokens of {item} bytes in {written.bytes:,} bytes"
            )
        if written.sequences != manifest.sequences_per_document * written.documents:
            return f"shard {shard.name} has {written.sequences:,} sequences in {written.documents:,} documents of {manifest.kind}"
        if bool(written.mask_sha256) != manifest.has_masks:
            return f"shard {shard.name} has {'a' if written.mask_sha256 else 'no'} mask, and the kind is {manifest.kind}"
        if origin.input + origin.inputs > len(manifest.inputs):
            return f"shard {shard.name} is of input {origin.input + origin.inputs - 1}, and there are {len(manifest.inputs)}"
    if manifest.num_bytes > MAX_COUNT:
        return f"its shards have {manifest.num_bytes:,} bytes together"
    return None
