"""The options of a run: what all phases share, and what each phase makes of it.

They are resolved once, when a run begins, and from then on they are what its `config.json` says.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

from minimind_data.dataset.format import Kind
from minimind_data.errors import UserError
from minimind_data.options import flatten, leaves, options_from, options_in_file
from minimind_train.batches.options import DataOptions, source_texts
from minimind_train.model.config import LoraConfig, ModelConfig
from minimind_train.objectives.options import ObjectiveOptions, PreferenceOptions
from minimind_train.order.mixture import MixtureStage
from minimind_train.resume_policy import Resume, names_of, policies
from minimind_train.run_folder.record import RESTORE, RUN_CONFIG_NAME, RunRecord
from minimind_train.training.options import OptimizerOptions, TrainingOptions, ValidationOptions
from minimind_train.weights.options import StartOptions


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of a run of any phase. A phase changes defaults, and may have options of its objective."""

    command: ClassVar[str]
    """What `mm-train` calls the phase, and what the run's record says."""
    dataset_kind: ClassVar[Kind]
    """The kind of dataset that it learns."""
    default_epochs: ClassVar[int] = 2
    """Times through the dataset where nobody says how long."""

    start: StartOptions = field(default_factory=StartOptions)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataOptions = field(default_factory=DataOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimizerOptions = field(default_factory=OptimizerOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)

    @classmethod
    def of(cls, **options: Any) -> Self:
        """Return options by the names that they have on the command line and in run.toml, the others at the phase's defaults.

            SftOptions.of(shards="data/sft", run="runs/sft", from_weight="runs/pretrain", learning_rate=2e-5)

        Raises:
            ValueError: there is no such option, or it cannot have that value.
        """
        refuse_unknown(cls, options)
        return options_from(cls, options)


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(RunOptions):
    """The options of a pre-training run."""

    command: ClassVar[str] = "pretrain"
    dataset_kind: ClassVar[Kind] = "pretrain"


@dataclass(frozen=True, kw_only=True)
class SftOptions(RunOptions):
    """The options of supervised fine-tuning; epochs, batch and learning rate are MiniMind's."""

    command: ClassVar[str] = "sft"
    dataset_kind: ClassVar[Kind] = "sft"

    start: StartOptions = field(default_factory=partial(StartOptions, from_weight="runs/pretrain"))
    data: DataOptions = field(default_factory=partial(DataOptions, layout="pad", seq_len=768))
    optim: OptimizerOptions = field(default_factory=partial(OptimizerOptions, learning_rate=1e-5))
    training: TrainingOptions = field(
        default_factory=partial(TrainingOptions, run=Path("runs/sft"), global_batch=16, micro_batch=16)
    )

    def __post_init__(self) -> None:
        if self.data.layout == "concat":
            raise ValueError(
                "layout concat cuts conversations apart, and an answer without its question teaches nothing; take pad or pack"
            )


@dataclass(frozen=True, kw_only=True)
class DpoOptions(RunOptions):
    """The options of direct preference optimization; epochs, batch and learning rate are MiniMind's."""

    command: ClassVar[str] = "dpo"
    dataset_kind: ClassVar[Kind] = "dpo"
    default_epochs: ClassVar[int] = 1

    start: StartOptions = field(default_factory=partial(StartOptions, from_weight="runs/sft"))
    data: DataOptions = field(default_factory=partial(DataOptions, layout="pad", seq_len=1024))
    objective: PreferenceOptions = field(default_factory=PreferenceOptions)
    optim: OptimizerOptions = field(default_factory=partial(OptimizerOptions, learning_rate=4e-8))
    training: TrainingOptions = field(
        default_factory=partial(TrainingOptions, run=Path("runs/dpo"), global_batch=4, micro_batch=4)
    )

    def __post_init__(self) -> None:
        if self.data.layout != "pad":
            raise ValueError(f"`layout` must be pad, a pair a window, not {self.data.layout}")


PHASE_OPTIONS: Mapping[str, type[RunOptions]] = {
    options.command: options for options in (PretrainOptions, SftOptions, DpoOptions)
}
"""The options of each phase, by what `mm-train` calls it."""


def refuse_unknown(kind: type[RunOptions], names: Iterable[str]) -> None:
    """Refuse names of no option.

    Raises:
        UserError: there is one; the message says which option has a name like that.
    """
    option_names = [name for name, _, _ in leaves(kind)]
    for name in names:
        if name not in option_names:
            near = difflib.get_close_matches(name, option_names, n=1)
            remedy = (
                f"did you mean `{near[0]}`?" if near else f"its options are the fields of {kind.__name__}"
            )
            raise UserError(f"{name} is no option of {kind.command}", remedy=remedy, option=name)


def changeable(kind: type[RunOptions]) -> frozenset[str]:
    """Return the names that `--allow-change` takes in a phase with these options."""
    options = names_of(kind, Resume.ALLOWED, Resume.TRAINING, Resume.UNLESS_BALANCED, Resume.END)
    return options | {"dataset", "tokenizer"}


def recorded(options: RunOptions) -> dict[str, Any]:
    """Return the options as `config.json` holds them."""
    unrecorded = names_of(type(options), Resume.UNRECORDED)
    flat = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in flatten(options).items()
        if name not in unrecorded
    }
    shards, stages = options.data.shards, options.data.mixture_stages
    mixed = {"shards": list(shards), "mixture_stages": [stage.as_dict() for stage in stages]}
    return flat | (mixed if stages else {"shards": shards[0], "mixture_stages": []})


def options_of(record: RunRecord, run: Path) -> RunOptions:
    """Return the options of a run from its record.

    Raises:
        UserError: the run is of a phase that this program does not know, or an option has a value that it may not have.
    """
    kind, path = kind_of(record, run), run / RUN_CONFIG_NAME
    if "shards" not in record.options:
        raise UserError("edited or damaged (shards is missing)", where=path, remedy=RESTORE)
    # A default may be a tuple, which JSON does not have; and one dataset stands there by itself.
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in begun_with(kind, record).items()
    }
    if isinstance(values["shards"], str):
        values["shards"] = [values["shards"]]
    options = options_in_file(kind, values | {"run": str(run)}, path, remedy=RESTORE)
    return replace(options, training=replace(options.training, run=run))


def options_with(kind: type[RunOptions], values: Mapping[str, Any], run: Path) -> RunOptions:
    """Return the options of a run from those in its record, which have been checked, and others that the user gave.

    Raises:
        ValueError: an option has a value that it may not have.
    """
    stages = tuple(map(MixtureStage.of, values["mixture_stages"]))
    return options_from(
        kind, {**values, "shards": source_texts(values["shards"]), "mixture_stages": stages, "run": run}
    )


def kind_of(record: RunRecord, run: Path) -> type[RunOptions]:
    """Return the options of the phase that a run is of.

    Raises:
        UserError: this program does not know it.
    """
    if record.command not in PHASE_OPTIONS:
        raise UserError(
            f"a run of `mm-train {record.command}`, which this program does not have",
            where=run,
            remedy="resume it with the program that began it",
        )
    return PHASE_OPTIONS[record.command]


def begun_with(kind: type[RunOptions], record: RunRecord) -> dict[str, Any]:
    """Return what a run was begun with, by flat name, whether its record knows all options or is older than some."""
    return {name: policy.before for name, policy in policies(kind).items()} | record.options
