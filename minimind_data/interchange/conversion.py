"""convert(): from another project's token files to a dataset of ours, and the other way round. `formats` has the formats.

To shards: every document gets our frame, BOS (where the tokenizer has one) and EOS. Those that it has already are kept; those that it lacks
are added and counted. A stream
without borders between documents is cut at a separator. Ids are not decoded, so the tokenizer that made them must be named; an id beyond
its vocabulary ends the conversion.

From shards: a document is framed like that, and the class of each format says what it leaves out of that. Conversations and pairs can be
converted to tables only (hf and parquet), which have `labels` beside the ids.

Formats that say where documents end give the same documents when they are converted back. Streams (nanogpt and llmc) may not; see `streams`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from minimind_data.dataset.checked_reading import check_kind
from minimind_data.dataset.format import (
    TOKENIZER_NAME,
    InputEntry,
    Manifest,
    ShardEntry,
    ShardOrigin,
    dtype_for,
    numpy_dtype,
)
from minimind_data.dataset.framing import BLOCK_TOKENS, Framed, frame_documents
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.dataset.staging import durable_file, new_folder, unique_names, write_metadata
from minimind_data.dataset.writer import ShardWriter
from minimind_data.errors import UserError
from minimind_data.files import sha256_of_stream
from minimind_data.inputs.hashes import InputHashes
from minimind_data.inputs.sources import Source
from minimind_data.interchange.base import Part, ReadOptions, TokenFiles, TokenFormat, WriteOptions
from minimind_data.interchange.formats import ALIASES, FORMAT_NAMES, FORMATS, SHARDS, detect
from minimind_data.json_fields import as_file_name
from minimind_data.options import as_paths, parse_size
from minimind_data.reporting import Progress, Report, no_progress
from minimind_data.tokenizer.loading import (
    BosToken,
    EosToken,
    PadToken,
    SpecialTokens,
    Tokenizer,
    load_tokenizer,
)


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """How token files are converted to a dataset, or a dataset to token files."""

    out: Annotated[Path, "Folder to write, new or empty."]
    tokenizer: Annotated[
        Path | None, "The tokenizer.json, or its folder, that made the ids; needed to make shards."
    ] = None
    separator_id: Annotated[
        int | None,
        "From nanogpt and llmc: id between documents; by default EOS in nanogpt, BOS in llmc (EOS if there is none).",
    ] = None
    column: Annotated[str, "Column of the ids in hf and parquet."] = "input_ids"
    shard_bytes: Annotated[int, "To shards: bytes of tokens in one shard.", parse_size] = 64 * 2**20
    one_file: Annotated[bool, "From shards: write one file for all shards instead of one for each."] = False
    copy: Annotated[bool, "To megatron: copy the shards instead of hard-linking them."] = False
    bos_token: BosToken = None
    eos_token: EosToken = None
    pad_token: PadToken = None

    def __post_init__(self) -> None:
        as_paths(self, "out", "tokenizer")
        if self.shard_bytes < 1:
            raise ValueError(f"`shard_bytes` must be at least 1, not {self.shard_bytes}")
        if self.separator_id is not None and self.separator_id < 0:
            raise ValueError(f"`separator_id` is a token id, 0 or more, not {self.separator_id}")


@dataclass(frozen=True, kw_only=True)
class ConvertSummary:
    """What a conversion did."""

    source_format: str
    target_format: str
    documents: int
    tokens: int
    """Of our dataset, whichever side it is."""
    files: int
    """Token files, or pairs of files, that were written."""
    bos_added: int = 0
    """Documents that had no BOS."""
    eos_added: int = 0
    empty: int = 0
    """Documents without any token of their own; they were left out."""
    separator_id: int | None = None
    """The id at which a stream was cut."""
    divided: int = 0
    """Documents with the dividing id inside, which readers of the target format take for several."""


def convert(
    source: Path | str,
    options: ConvertOptions,
    *,
    source_format: str = "auto",
    target_format: str = SHARDS,
    progress: Progress = no_progress,
) -> ConvertSummary:
    """Convert from or to our format.

    Args:
        source: a file or folder.
        options: how, and where to.
        source_format: one of `FORMAT_NAMES`, or `auto` to look at the content.
        target_format: one of `FORMAT_NAMES`; one of the two formats is `shards`.
        progress: shows the bytes that are read and the tokens that are done.

    Raises:
        UserError: the source is damaged or of another format, neither format is `shards`, or `out` cannot be made.
    """
    source = Path(source)
    origin = detect(source) if source_format == "auto" else ALIASES.get(source_format, source_format)
    target = ALIASES.get(target_format, target_format)
    for name in (origin, target):
        if name != SHARDS and name not in FORMATS:
            raise UserError(f"{name!r} is no format; known are {', '.join(FORMAT_NAMES)}")
    if origin == SHARDS and target != SHARDS:
        return _export(ShardSet.open(source), FORMATS[target], options, progress)
    if origin != SHARDS and target == SHARDS:
        return _import(FORMATS[origin].open(source), options, progress)
    if origin == SHARDS:
        raise UserError(
            "is a dataset of this program already",
            where=source,
            remedy="say with `target_format` what it should become",
        )
    raise UserError(
        f"is {origin}, and one side must be shards",
        where=source,
        remedy=f"convert it into shards, and these into {target}",
    )


def _import(files: TokenFiles, options: ConvertOptions, progress: Progress) -> ConvertSummary:
    origin = FORMATS[files.format]
    if options.tokenizer is None:
        raise UserError(
            "nothing in it says which tokenizer made its ids",
            where=files.token_files[0],
            remedy="name the tokenizer.json with `tokenizer`",
        )
    tokenizer = load_tokenizer(
        options.tokenizer, SpecialTokens(bos=options.bos_token, eos=options.eos_token, pad=options.pad_token)
    )
    separator_id = options.separator_id
    if separator_id is not None and "separator_id" not in origin.options:
        raise UserError(f"{origin.name} says itself where documents end", remedy="leave out `separator_id`")
    if separator_id is None:
        separator_id = origin.divider_id(tokenizer.info)
    with new_folder(options.out) as folder:
        paths = [*files.token_files, *files.index_files]
        hashes = InputHashes([Source(name=str(path), location=str(path), form=origin.name) for path in paths])
        hashes.begin()
        dataset = _Import(files, tokenizer, options, folder, separator_id)
        with progress("convert", sum(path.stat().st_size for path in files.token_files)) as report:
            dataset.run(report)
        return dataset.commit(hashes.entries())


class _Import:
    """Writes the batches of token files as shards; a shard holds documents of one input, and at most `shard_bytes` if it can."""

    def __init__(
        self,
        files: TokenFiles,
        tokenizer: Tokenizer,
        options: ConvertOptions,
        folder: Path,
        separator_id: int | None,
    ) -> None:
        self._origin, self._files = FORMATS[files.format], files
        self._tokenizer, self._options, self._folder = tokenizer, options, folder
        self._separator_id = separator_id
        self._dtype = dtype_for(tokenizer.info.vocab_size)
        self._names = unique_names([as_file_name(path.stem) for path in files.token_files])
        self._num_shards = [0] * len(files.token_files)
        self._entries: list[ShardEntry] = []
        self._bos_added = self._eos_added = self._empty = 0

    def run(self, report: Report) -> None:
        info, item = self._tokenizer.info, numpy_dtype(self._dtype).itemsize
        read_options = ReadOptions(
            vocab_size=info.vocab_size,
            separator_id=-1 if self._separator_id is None else self._separator_id,
            column=self._options.column,
            block_tokens=max(1, min(BLOCK_TOKENS, self._options.shard_bytes // item)),
        )
        shard: _OpenShard | None = None
        try:
            for batch in self._origin.read(self._files, read_options):
                framed = frame_documents(batch.tokens, batch.lengths, info, self._dtype)
                self._count(framed)
                if shard and (
                    shard.input != batch.input
                    or shard.num_tokens * item + framed.tokens.nbytes > self._options.shard_bytes
                ):
                    self._entries.append(shard.commit(self._files))
                    shard = None
                if len(framed.lengths):
                    shard = shard or _OpenShard(
                        self._folder, self._next_name(batch.input), self._dtype, batch.input, batch.start
                    )
                    shard.append(framed, batch.stop)
                report(batch.num_bytes, len(framed.tokens))
            if shard:
                self._entries.append(shard.commit(self._files))
        finally:
            if shard:
                shard.writer.__exit__(None, None, None)

    def commit(self, inputs: tuple[InputEntry, ...]) -> ConvertSummary:
        """Write the manifest."""
        if not self._entries:
            raise UserError(
                "no document with any token in it; nothing to convert", where=self._files.token_files[0]
            )
        # A shard of a whole file has the checksum of that file, which is known by now.
        shards = tuple(
            entry if entry.origin.input_sha256 else _of_whole_input(entry, inputs) for entry in self._entries
        )
        options: dict[str, Any] = {
            "converted_from": self._origin.name,
            "shard_bytes": self._options.shard_bytes,
        }
        if "separator_id" in self._origin.options:
            options["separator_id"] = self._separator_id
        if "column" in self._origin.options:
            options["column"] = self._options.column
        manifest = Manifest(
            kind="pretrain",
            dtype=self._dtype,
            tokenizer=self._tokenizer.info,
            options=options,
            inputs=inputs,
            shards=shards,
            empty_texts=self._empty,
        )
        write_metadata(self._folder, manifest, self._tokenizer.json.encode())
        return ConvertSummary(
            source_format=self._origin.name,
            target_format=SHARDS,
            documents=manifest.num_documents,
            tokens=manifest.num_tokens,
            files=len(shards),
            bos_added=self._bos_added,
            eos_added=self._eos_added,
            empty=self._empty,
            separator_id=self._separator_id,
        )

    def _count(self, framed: Framed) -> None:
        """Count the tokens that were added, but not those that stand for a separator: that was there."""
        info = self._tokenizer.info
        self._empty += framed.empty
        self._eos_added += 0 if self._separator_id == info.eos_id else framed.eos_added
        only_bos = self._separator_id == info.bos_id != info.eos_id
        self._bos_added += 0 if only_bos else framed.bos_added

    def _next_name(self, number: int) -> str:
        name = f"{self._names[number]}-{self._num_shards[number]:05d}"
        self._num_shards[number] += 1
        return name


class _OpenShard:
    """A shard that is being written, and the bytes of its input that it holds."""

    def __init__(self, folder: Path, name: str, dtype: Any, number: int, start: int) -> None:
        self.writer = ShardWriter(folder, name, dtype)
        self.input = number
        self.num_tokens = 0
        self._name, self._start, self._stop = name, start, start

    def append(self, framed: Framed, stop: int) -> None:
        self.writer.append(framed.tokens, framed.lengths)
        self.num_tokens += len(framed.tokens)
        self._stop = stop

    def commit(self, files: TokenFiles) -> ShardEntry:
        written = self.writer.commit()
        path = files.token_files[self.input]
        whole = (self._start, self._stop) == (0, path.stat().st_size)
        return ShardEntry(
            name=self._name,
            written=written,
            origin=ShardOrigin(
                input=self.input,
                input_start=self._start,
                input_stop=self._stop,
                input_sha256="" if whole else _sha256_of_part(path, self._start, self._stop),
            ),
        )


def _of_whole_input(entry: ShardEntry, inputs: Sequence[InputEntry]) -> ShardEntry:
    checksum = inputs[entry.origin.input].sha256
    return replace(entry, origin=replace(entry.origin, input_sha256=checksum))


def _sha256_of_part(path: Path, start: int, stop: int) -> str:
    with path.open("rb") as file:
        return sha256_of_stream(file, start, stop)


def _export(
    shards: ShardSet, target: TokenFormat, options: ConvertOptions, progress: Progress
) -> ConvertSummary:
    manifest = shards.manifest
    if not target.takes_conversations:
        check_kind(shards, target.name)
    write_options = WriteOptions(column=options.column, copy=options.copy)
    files: list[str] = []
    divided = 0
    with new_folder(options.out) as folder:
        with progress("convert", manifest.num_bytes) as report:
            for name, members in _parts(manifest, target, one_file=options.one_file):
                part = Part(name=name, shards=shards, members=members, report=report)
                divided += target.write(folder, part, write_options)
                files.append(f"{name}{target.suffix}")
        target.finish(folder, manifest, files, write_options)
        with durable_file(folder / TOKENIZER_NAME) as file:
            file.write((shards.folder / TOKENIZER_NAME).read_bytes())
    return ConvertSummary(
        source_format=SHARDS,
        target_format=target.name,
        documents=manifest.num_documents,
        tokens=manifest.num_tokens,
        files=len(files),
        divided=divided,
    )


def _parts(manifest: Manifest, target: TokenFormat, *, one_file: bool) -> list[tuple[str, range]]:
    """Return (name, shards) of each file to write, named as the target's own tools expect it."""
    number = len(manifest.shards)
    if one_file or target.is_one_file:
        groups, names = [range(number)], ["train"]
    else:
        groups, names = [range(i, i + 1) for i in range(number)], [entry.name for entry in manifest.shards]
    return list(zip(target.file_names(names), groups, strict=True))
