"""The flags of MiniMind's scripts, for users who paste their command lines: what each flag and its value are called here.

The scripts are `trainer/train_*.py` and `eval_llm.py` of August 2026. A flag that means the same here, such as `--hidden_size 512`, needs
no translation: flags may have underscores.
"""

import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_WEIGHTS = {"pretrain", "full_sft", "dpo", "reason", "ppo_actor", "grpo", "rlhf", "full_dist"}
_A_BEGINNING = "为什么天空是蓝色的"
_NO_VALUE = {"use_wandb"}
_YES_OR_NO = {"0", "1"}


@dataclass(frozen=True, kw_only=True)
class _Script:
    """A script of MiniMind's that does what one of our commands does: its defaults, and the kind of dataset that it reads."""

    weight: str
    """The default of --save_weight, or of --weight."""
    batch_size: int = 0
    accumulation_steps: int = 1
    kind: str = ""
    """The option that `mm-data tokenize` needs besides the file."""


_SCRIPTS = {
    "pretrain": _Script(weight="pretrain", batch_size=32, accumulation_steps=8),
    "sft": _Script(weight="full_sft", batch_size=16, kind=" --kind sft"),
    "dpo": _Script(weight="dpo", batch_size=4, kind=" --kind dpo"),
    "generate": _Script(weight="full_sft"),
}
_LORA = _Script(weight="lora_medical", batch_size=32, kind=" --kind sft")
"""train_lora.py, which is `sft` here."""


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A command line that has flags of MiniMind's."""

    script: _Script
    theirs: Mapping[str, str] = field(default_factory=dict)
    """The value of each flag of MiniMind's, by its name."""

    def number(self, name: str, default: int) -> int:
        """Return the value of a flag, or the default where it is missing, zero or no number."""
        text = self.theirs.get(name, "")
        return int(text) if text.isdecimal() and int(text) else default

    @property
    def accumulation_steps(self) -> int:
        """MiniMind's steps in each update."""
        return self.number("accumulation_steps", self.script.accumulation_steps)

    @property
    def global_batch(self) -> int:
        """Samples in each update of one process."""
        return self.number("batch_size", self.script.batch_size) * self.accumulation_steps

    @property
    def dataset_folder(self) -> str:
        """A folder for the dataset of --data_path, for a shell."""
        return shlex.quote(f"data/{Path(self.theirs['data_path']).stem}")

    def weights_file(self, weight: str) -> str:
        """Return the .pth in which MiniMind's scripts keep the weights of this name, for a shell."""
        folder = self.theirs.get("save_dir", "out")
        experts = "_moe" if self.theirs.get("use_moe") == "1" else ""
        return shlex.quote(f"{folder}/{weight}_{self.number('hidden_size', 768)}{experts}.pth")

    @property
    def model_file(self) -> str:
        """The .pth that `eval_llm.py` loads, for a shell."""
        return self.weights_file(self.theirs.get("weight", self.script.weight))


_Rule = Callable[[_Line, str], tuple[str, str]]
"""Takes the command line and the value of a flag; returns (our flags, a remark)."""


def _only_if(words: str, why_not: str) -> _Rule:
    return lambda _, value: ("", why_not) if value == "0" else (words, "")


def _nothing(why: str) -> _Rule:
    return lambda _line, _value: ("", why)


def _run(line: _Line, _value: str) -> tuple[str, str]:
    folder, name = line.theirs.get("save_dir", "runs"), line.theirs.get("save_weight", line.script.weight)
    return f"--run {shlex.quote(f'{folder}/{name}')}", "a folder for each run"


def _batch(line: _Line, value: str) -> tuple[str, str]:
    if "accumulation_steps" in line.theirs:
        return f"--micro-batch {value}", ""
    global_batch, remark = _accumulation(line, value)
    return f"--micro-batch {value} {global_batch}", remark


def _accumulation(line: _Line, _value: str) -> tuple[str, str]:
    return f"--global-batch {line.global_batch}", "batch_size x accumulation_steps x processes"


def _interval(flag: str) -> _Rule:
    def rule(line: _Line, value: str) -> tuple[str, str]:
        number = max(1, int(value) // line.accumulation_steps) if value.isdecimal() else value
        return f"{flag} {number}", "counted in updates, not in micro-batches"

    return rule


def _length(line: _Line, value: str) -> tuple[str, str]:
    if not value.isdecimal():
        return f"--seq-len {value}", ""
    targets = int(value) - 1
    layout = (
        "; MiniMind's samples also need --layout pad" if line.script is _SCRIPTS["pretrain"] else ""
    )  # the default of the others
    return (
        f"--seq-len {targets}",
        f"{value} tokens have {targets} targets, and --seq-len counts targets{layout}",
    )


def _data(line: _Line, _value: str) -> tuple[str, str]:
    return f"--shards {line.dataset_folder}", "a dataset, which is made once"


def _initial_weights(line: _Line, value: str) -> tuple[str, str]:
    return f"--from-weight {line.weights_file(value)}", "or a run's folder"


def _adapters(line: _Line, value: str) -> tuple[str, str]:
    if value == "None":
        return "", "leave it out"
    folder = line.theirs.get("save_dir", "out")
    file = f"{folder}/{value}_{line.number('hidden_size', 768)}.pth"
    return f"--lora {shlex.quote(file)}", ""


_TRAINING: dict[str, _Rule] = {
    "save_dir": _run,
    "save_weight": _run,
    "batch_size": _batch,
    "accumulation_steps": _accumulation,
    "dtype": lambda _, value: (f"--dtype {_DTYPES[value]}", ""),
    "num_workers": _nothing("leave it out; one thread reads ahead from memory maps"),
    "log_interval": _interval("--log-every"),
    "save_interval": _interval("--save-every"),
    "max_seq_len": _length,
    "use_moe": _only_if("--use-moe", "leave it out"),
    "data_path": _data,
    "from_weight": _initial_weights,
    "from_resume": _only_if("--resume auto", "leave it out"),
    "use_wandb": lambda _line, _value: (
        "--track swanlab",
        "which MiniMind uses; wandb and tensorboard work too",
    ),
    "wandb_project": lambda _, value: (f"--track-project {shlex.quote(value)}", ""),
    "use_compile": _only_if("--compile", "leave it out"),
    "lora_name": lambda _, value: (f"--run runs/{shlex.quote(value)} --lora-rank 16", ""),
}
_GENERATION: dict[str, _Rule] = {
    "load_from": lambda line, value: (
        f"--run {line.model_file if Path(value).name == 'model' else shlex.quote(value)}",
        "",
    ),
    "save_dir": lambda line, _: (f"--run {line.model_file}", ""),
    "weight": lambda line, _: (f"--run {line.model_file}", ""),
    "lora_weight": _adapters,
    "use_moe": _only_if("--use-moe", "leave it out"),
    "open_thinking": _only_if("--thinking", "leave it out"),
    "historys": _only_if("--chat", "without --chat there is no history"),
    "show_speed": _nothing("leave it out"),
}
_RULES = {"pretrain": _TRAINING, "sft": _TRAINING, "dpo": _TRAINING, "generate": _GENERATION}


def translation(command: str, words: Sequence[str], flags: Collection[str]) -> str | None:
    """Return what to type in place of a command line that has flags of MiniMind's; None where it has none.

    Args:
        command: of `mm-train`, such as `sft`.
        words: what follows it.
        flags: those of the command.
    """
    rules = _RULES.get(command, {})
    pieces = list(_pieces(words, rules, flags))
    theirs = {name: value for name, value, _ in pieces if name}
    if not theirs:
        return None
    script = _LORA if "lora_name" in theirs else _SCRIPTS[command]
    line = _Line(script=script, theirs={**_values(words), **theirs})
    rows, ours = [], []
    for name, value, text in pieces:
        if not name:
            ours.append(text)
            continue
        here, note = rules[name](line, value)
        rows.append(f"  {text}: {here}{f' ({note})' if here and note else note}")
        if here and here not in ours:
            ours.append(here)
    if command == "generate":
        ours += _what_eval_llm_has_by_default(line, ours)
    if script is _LORA:
        ours += _what_train_lora_has_by_default(line, ours)
    commands = [f"mm-train {command} {' '.join(ours)}"]
    if data := theirs.get("data_path"):
        commands.insert(
            0, f"mm-data tokenize {shlex.quote(data)}{line.script.kind} --out {line.dataset_folder}"
        )
    return "\n".join(
        [
            f"MiniMind's {'flag has another name' if len(rows) == 1 else 'flags have other names'} here:",
            *rows,
            "so type:",
            *(f"  {text}" for text in commands),
        ]
    )


def _what_eval_llm_has_by_default(line: _Line, ours: Sequence[str]) -> Iterator[str]:
    """Yield what `mm-train generate` needs and `eval_llm.py` takes without a flag: its weights, and a chat or a text to continue."""
    flags = _flags_of(ours)
    if "--run" not in flags:
        yield f"--run {line.model_file}"
    if not flags & {"--chat", "--prompt"}:
        yield f"--prompt {_A_BEGINNING}" if "pretrain" in line.model_file else "--chat"


def _what_train_lora_has_by_default(line: _Line, ours: Sequence[str]) -> Iterator[str]:
    """Yield the settings of `train_lora.py` that are not the defaults of `mm-train sft`, where no flag says otherwise."""
    weights, _ = _initial_weights(line, "full_sft")
    settings = (
        "--epochs 10",
        "--learning-rate 1e-4",
        "--seq-len 339",
        f"--micro-batch {line.script.batch_size}",
        f"--global-batch {line.global_batch}",
        weights,
    )
    flags = _flags_of(ours)
    yield from (setting for setting in settings if setting.partition(" ")[0] not in flags)


def _flags_of(words: Sequence[str]) -> set[str]:
    """Return the flags in pieces of a command line, some of which are a flag with its value, or several."""
    return {word.partition("=")[0] for piece in words for word in piece.split() if word.startswith("--")}


def with_dashes(word: str, flags: Collection[str]) -> str:
    """Return one of `flags` that was typed with underscores as it is spelled, and any other word as it is."""
    flag, equals, value = word.partition("=")
    spelled = flag.replace("_", "-")
    return f"{spelled}{equals}{value}" if flag.startswith("--") and spelled in flags else word


def _pieces(
    words: Sequence[str], rules: Mapping[str, _Rule], flags: Collection[str]
) -> Iterator[tuple[str, str, str]]:
    """Yield (name, value, text) of each flag of MiniMind's on a line, and ("", "", text) of each other word."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        following = value if equals else rest[0] if rest else ""
        if name not in rules or not _is_theirs(name, following, flag, flags):
            yield "", "", shlex.quote(with_dashes(word, flags))
        elif name in _NO_VALUE:
            yield name, "", word
        else:
            if not equals and rest:
                word += f" {shlex.quote(rest.pop(0))}"
            yield name, following, word


def _is_theirs(name: str, value: str, flag: str, flags: Collection[str]) -> bool:
    """Tell whether a flag is MiniMind's, by its name, or by its value where we have the name too."""
    if f"--{flag[2:].replace('_', '-')}" not in flags:
        return True
    match name:
        case "dtype":
            return value in _DTYPES
        case "use_moe":
            return value in _YES_OR_NO
        case "from_weight":
            return value in _WEIGHTS and not Path(value).exists()
        case _:
            return False


def _values(words: Sequence[str]) -> dict[str, str]:
    """Return the word after each flag, by the flag's name: file names need those of flags without a rule, such as --hidden_size."""
    pairs = zip(words, [*words[1:], ""], strict=True)
    return {word[2:].replace("-", "_"): value for word, value in pairs if word.startswith("--")}
