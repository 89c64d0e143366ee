"""What is changed, and what reads it: folders as somebody may have got them from elsewhere, each with the commands that take one."""

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minimind_data.interchange.conversion import ConvertOptions, convert
from minimind_data.interchange.formats import ALIASES, FORMATS
from minimind_train.run import entry
from minimind_train.run.opening import open_run
from minimind_train.weights.exporting import export
from tests.helpers.commands import mm_data, mm_train
from tests.helpers.datasets import chat_dataset, text_dataset
from tests.helpers.runs import Said, config_of
from tests.hostile.changes import mend_dataset, mend_run, mend_work

TINY_MODEL = [
    "--hidden-size",
    "16",
    "--num-hidden-layers",
    "1",
    "--num-attention-heads",
    "2",
    "--num-key-value-heads",
    "1",
]
TRAINING = [
    "--seq-len",
    "16",
    *TINY_MODEL,
    "--global-batch",
    "4",
    "--steps",
    "1",
    "--threads",
    "1",
    "--device",
    "cpu",
    "--run",
    "NEW",
]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of folder.

    Attributes:
        files: globs of the files in it that are changed.
        mend: makes the checksums in it fit again.
        commands: each is given as the words of a command line, in which IT is the folder, NEW a new one and BESIDE the place of what it
            needs; or a function of these three.
    """

    files: Sequence[str]
    commands: Sequence[Sequence[str] | Callable[[Path, Path, Path], object]]
    mend: Callable[[Path], None] = lambda _: None


def _resume_a_step(run: Path, _new: Path, _beside: Path) -> None:
    entry.resume(run, say=Said(), stop=lambda: True)


def _open(run: Path, _new: Path, _beside: Path) -> None:
    trained = open_run(run, say=Said())
    with contextlib.suppress(StopIteration):
        next(trained.complete("a"))
    if trained.options is not None:
        trained.windows[trained.order.window(0)[1]]


def _dataset(kind: str) -> Target:
    layouts = (
        ["concat", "pad", "pack"] if kind == "pretrain" else ["pad", "pack"] if kind == "sft" else ["pad"]
    )
    windows = [
        ["mm-data", "window", "IT", str(number), "--seq-len", "48", "--layout", layout]
        for layout in layouts
        for number in (0, 3)
    ]
    base = [] if kind == "pretrain" else ["--from-weight", "none"]
    training = (
        [word for word in TRAINING if word not in ("--seq-len", "16")] if kind != "pretrain" else TRAINING
    )
    train = [
        [
            "mm-train",
            kind,
            "--shards",
            "IT",
            *training,
            *base,
            *(["--seq-len", "48"] if kind != "pretrain" else []),
        ]
    ]
    if kind == "pretrain":
        train.append([*train[0], "--layout", "pack"])
    if kind == "dpo":
        train = [[word if word != "none" else "BESIDE/base" for word in train[0] if word not in TINY_MODEL]]
    return Target(
        files=["manifest.json", "*.bin", "*.idx", "*.mask", "tokenizer.json", "tokenizer_config.json", ".mm-pack/*", "reference/*"],
        mend=mend_dataset,
        commands=[
            ["mm-data", "info", "IT"],
            ["mm-data", "verify", "IT"],
            ["mm-data", "stats", "IT", "--seq-len", "48", "--html", "NEW", "--windows", "2"],
            ["mm-data", "locate", "IT", "--seq-len", "48", "--position", "5", "--layout", layouts[-1]],
            ["mm-data", "merge", "IT", "IT", "--out", "NEW"],
            ["mm-data", "shuffle", "IT", "--out", "NEW"],
            *([["mm-data", "convert", "IT", "--to", form, "--out", "NEW"] for form in ("hf", "megatron", "parquet", "datatrove")]),
            ["mm-data", "tokenize", f"BESIDE/{kind}.jsonl", "--kind", kind, "--out", "IT", "--workers", "1"],
            *windows,
            *train,
        ],
    )  # fmt: skip


_RUN_COMMANDS = [
    ["mm-train", "generate", "--run", "IT", "--prompt", "a", "--max-new-tokens", "3", "--device", "cpu"],
    [
        "mm-train",
        "generate",
        "--run",
        "IT",
        "--chat",
        "--prompt",
        "a",
        "--max-new-tokens",
        "3",
        "--device",
        "cpu",
    ],
    ["mm-train", "eval", "--run", "IT", "--shards", "BESIDE/DATA", "--device", "cpu"],
    _open,
]
_OF_RUNS = [
    *[
        ["mm-train", "export", "--run", "IT", "--to", form, "--out", "NEW"]
        for form in ("hf", "minimind", "peft", "minimind-lora")
    ],
    ["mm-train", "plot", "IT", "--out", "NEW.html"],
    ["mm-data", "locate", "--run", "IT", "--position", "3"],
    [
        "mm-train",
        "pretrain",
        "--config",
        "IT/run.toml",
        "--run",
        "NEW",
        "--steps",
        "1",
        "--device",
        "cpu",
        "--nproc",
        "1",
    ],
    _resume_a_step,
    _resume_a_step,
]


def _for_data(commands: Sequence, data: str) -> list:
    return [
        [word.replace("DATA", data) for word in command] if isinstance(command, list) else command
        for command in commands
    ]


def _run_target(data: str) -> Target:
    files = [
        "config.json",
        "config.json",
        "run.toml",
        "metrics.jsonl",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    return Target(
        files=[*files, "checkpoints/*/state.json", "checkpoints/*/*.safetensors", "checkpoints/*/state.json"],
        mend=mend_run,
        commands=_for_data([*_RUN_COMMANDS, *_OF_RUNS], data),
    )


def _foreign(form: str) -> Target:
    return Target(
        files=["*"],
        commands=[
            ["mm-data", "convert", "IT", "--from", kind, "--out", "NEW", "--tokenizer", "BESIDE/pretrain"]
            for kind in (form, form, "auto")
        ],
    )


FOREIGN = (*FORMATS, *ALIASES)
TARGETS: Mapping[str, Target] = {
    "pretrain": _dataset("pretrain"),
    "sft": _dataset("sft"),
    "dpo": _dataset("dpo"),
    "run": _run_target("pretrain"),
    "tuned": _run_target("sft"),
    "hf": Target(
        files=["config.json", "config.json", "*.json", "*.safetensors"],
        commands=_for_data(
            [
                *_RUN_COMMANDS,
                *([["mm-train", "export", "--run", "IT", "--to", form, "--out", "NEW"] for form in ("hf", "minimind", "gguf")]),
                [
                    "mm-train", "pretrain", "--shards", "BESIDE/pretrain", "--from-weight", "IT", "--run", "NEW", "--steps", "1",
                    "--seq-len", "16", "--global-batch", "2", "--device", "cpu", "--threads", "1",
                ],
            ],
            "pretrain",
        ),
    ),
    "tokenizer": Target(
        files=["tokenizer.json", "tokenizer_config.json"],
        commands=[
            ["mm-data", "tokenize", "BESIDE/pretrain.jsonl", "--tokenizer", "IT", "--out", "NEW", "--workers", "1"],
            ["mm-data", "tokenize", "BESIDE/sft.jsonl", "--kind", "sft", "--tokenizer", "IT", "--out", "NEW", "--workers", "1"],
        ],
    ),
    "work": Target(
        files=[".mm-build/**/*.json", ".mm-build/*.json"],
        mend=mend_work,
        commands=[
            ["mm-data", "tokenize", "BESIDE/pretrain.jsonl", "--out", "IT", "--workers", "1", "--split-bytes", "1KiB"],
            ["mm-data", "commit", "IT"],
        ],
    ),
    **{f"foreign-{form}": _foreign(form) for form in FOREIGN},
}  # fmt: skip
"""Every kind of folder by name."""


def make_all(home: Path) -> None:
    """Make a folder of each kind in `home`, under the names of `TARGETS`, and what they need."""
    lines = [{"text": f"The number {number} is not {number + 1}. 北京"} for number in range(60)]
    _write_lines(home / "pretrain.jsonl", lines)
    text_dataset(home / "pretrain")
    for kind in ("sft", "dpo"):
        folder = chat_dataset(home / "made" / kind, kind, 12)
        shutil.copytree(folder, home / kind)
        shutil.copy(folder.parent / "chats.jsonl", home / f"{kind}.jsonl")
    shutil.copytree(
        home / "sft",
        home / "tokenizer",
        ignore=shutil.ignore_patterns("*.bin", "*.idx", "*.mask", "manifest.json"),
    )
    entry.begin(
        config_of(home / "run", home / "pretrain", steps=3, save_every=2, val_shards=str(home / "pretrain")),
        Said(),
    )
    tiny = ["--seq-len", "64", *TINY_MODEL, "--global-batch", "4", "--threads", "1", "--device", "cpu"]
    _succeed(
        "sft",
        "--shards",
        home / "sft",
        "--from-weight",
        "none",
        *tiny,
        "--steps",
        "2",
        "--run",
        home / "base",
    )
    lora = ["--from-weight", home / "base", "--lora-rank", "2"]
    _succeed(
        "sft",
        "--shards",
        home / "sft",
        *lora,
        "--seq-len",
        "64",
        "--steps",
        "3",
        "--save-every",
        "2",
        "--run",
        home / "tuned",
    )
    _succeed(
        "dpo",
        "--shards",
        home / "dpo",
        "--from-weight",
        home / "base",
        "--seq-len",
        "48",
        "--steps",
        "1",
        "--run",
        home / "made" / "dpo-run",
    )
    for kind, layout in (("pretrain", "pack"), ("sft", "pack")):
        assert mm_data("window", home / kind, 0, "--seq-len", 48, "--layout", layout).exit_code == 0
    export(home / "run", home / "hf", to="hf", say=Said())
    for form in FOREIGN:
        convert(home / "pretrain", ConvertOptions(out=home / f"foreign-{form}"), target_format=form)
    result = mm_data(
        "tokenize",
        home / "pretrain.jsonl",
        "--out",
        home / "work",
        "--workers",
        1,
        "--split-bytes",
        "1KiB",
        "--task",
        "1/2",
    )
    assert result.exit_code == 0, result.output


def _succeed(*arguments: object) -> None:
    result = mm_train(*arguments)
    assert result.exit_code == 0, result.output


def _write_lines(path: Path, lines: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
