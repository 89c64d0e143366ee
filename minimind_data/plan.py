"""What a build is to make: its options, the splits and their names, what must stay the same, and the inputs' checksums.

Everything here follows from the inputs and the options alone, so any number of machines plan the same build.
"""

import dataclasses
import itertools
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from minimind_data.errors import UserError
from minimind_data.files import sha256_of
from minimind_data.format import InputEntry
from minimind_data.options import parse_size
from minimind_data.records import LineReader, plan_splits, read_blocks
from minimind_data.split import SplitTask
from minimind_data.tokenizer import Backend, Tokenizer

_MIN_SPLIT_BYTES = 1024
_SAMPLE_PLACES = 4
_SAMPLE_TEXTS_PER_PLACE = 8
_SAMPLE_MAX_CHARS = 2**14


@dataclass(frozen=True, kw_only=True)
class TokenizeOptions:
    """How text becomes shards."""

    out: Annotated[Path, "Folder of the dataset."] = Path("data")
    tokenizer: Annotated[
        Path | None, "A tokenizer.json or its folder; by default the one that ships with this program."
    ] = None
    kind: Annotated[Literal["pretrain"], "What the records are for."] = "pretrain"
    field: Annotated[str, "Field of the record that holds the text."] = "text"
    workers: Annotated[int, "Cores to keep busy, of the whole cluster with --engine ray; 0 takes all."] = 0
    split_bytes: Annotated[int, "Bytes of input that make one shard.", parse_size] = 64 * 2**20
    engine: Annotated[
        Literal["local", "ray"], "Where the work runs: here, or on the Ray cluster of RAY_ADDRESS."
    ] = "local"
    on_bad_record: Annotated[
        Literal["stop", "set-aside"], "Stop at a bad record, or put it into a file and go on."
    ] = "stop"
    backend: Annotated[Backend, "Encoder; auto takes the fastest that proves exact."] = "auto"
    max_word_chars: Annotated[int, "Longest run without a break that a text may hold."] = 1_000_000
    bos_token: Annotated[str | None, "Token before each text, if tokenizer_config.json does not say."] = None
    eos_token: Annotated[str | None, "Token behind each text, likewise."] = None
    pad_token: Annotated[str | None, "Token that fills windows, likewise."] = None

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers must be 0 (all cores) or more, not {self.workers}")
        if self.split_bytes < _MIN_SPLIT_BYTES:
            raise ValueError(f"split_bytes must be at least {_MIN_SPLIT_BYTES}, not {self.split_bytes}")
        if self.max_word_chars < 1:
            raise ValueError(f"max_word_chars must be at least 1, not {self.max_word_chars}")


class InputHashes:
    """Hashes whole inputs in the background, and notices an input that changes under the build."""

    def __init__(self, inputs: Sequence[Path]) -> None:
        self._inputs = inputs
        self._stamps = [self._stamp(path) for path in inputs]
        self._digests: list[str] = []
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._hash, daemon=True)
        self._thread.start()

    def entries(self) -> tuple[InputEntry, ...]:
        """Wait for the hashes.

        Raises:
            UserError: an input changed since this was made.
        """
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        for path, stamp in zip(self._inputs, self._stamps, strict=True):
            if self._stamp(path) != stamp:
                raise UserError(f"{path}: was changed while it was being read; run the same command again")
        return tuple(
            InputEntry(path=str(path), bytes=stamp[0], sha256=digest)
            for path, stamp, digest in zip(self._inputs, self._stamps, self._digests, strict=True)
        )

    def _hash(self) -> None:
        try:
            self._digests.extend(map(sha256_of, self._inputs))
        except OSError as error:
            self._failure = error

    @staticmethod
    def _stamp(path: Path) -> tuple[int, int]:
        status = path.stat()
        return status.st_size, status.st_mtime_ns


def plan_tasks(inputs: Sequence[Path], split_bytes: int) -> list[SplitTask]:
    """Name every split of every input: by the input's name, numbered where two inputs share one."""
    tasks: list[SplitTask] = []
    stems = [path.name.removesuffix(".jsonl") for path in inputs]
    taken: set[str] = set()
    for number, (path, stem) in enumerate(zip(inputs, stems, strict=True)):
        free = (
            f"{stem}~{count}" for count in itertools.count(2) if f"{stem}~{count}" not in taken.union(stems)
        )
        prefix = next(free) if stem in taken else stem
        taken.add(prefix)
        for index, split in enumerate(plan_splits(path, split_bytes)):
            tasks.append(SplitTask(name=f"{prefix}-{index:05d}", input=number, split=split))
    return tasks


def settings_of(options: TokenizeOptions, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what decides the bytes of the dataset besides its inputs."""
    return {
        "kind": options.kind,
        "tokenizer": asdict(tokenizer.info),
        "options": {
            "field": options.field,
            "split_bytes": options.split_bytes,
            "max_word_chars": options.max_word_chars,
        },
    }


def flat_settings(kind: str, tokenizer: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a dataset under the names that a comparison shows."""
    return {"kind": kind, **{f"tokenizer {name}": value for name, value in tokenizer.items()}, **options}


def contents_of(inputs: Sequence[InputEntry]) -> dict[str, Any]:
    """Return what the inputs hold under the names that a comparison shows; their folders do not matter."""
    told: dict[str, Any] = {"number of inputs": len(inputs)}
    return told | {
        f"input {i + 1}": f"{Path(entry.path).name} {entry.sha256[:12]}…" for i, entry in enumerate(inputs)
    }


def sample_texts(tasks: list[SplitTask], options: TokenizeOptions) -> list[str]:
    """Return some short texts from a few places of the input; bad records are not this function's business."""
    texts: list[str] = []
    step = max(1, len(tasks) // _SAMPLE_PLACES)
    for task in tasks[::step][:_SAMPLE_PLACES]:
        reader = LineReader(
            dataclasses.replace(task.split, stop=min(task.split.stop, task.split.start + _SAMPLE_MAX_CHARS))
        )
        found = [
            text
            for block in read_blocks(reader, field=options.field, max_word_chars=options.max_word_chars)
            for text in block.texts
        ]
        texts += [text[:_SAMPLE_MAX_CHARS] for text in found[:_SAMPLE_TEXTS_PER_PLACE]]
    return texts
