"""Trained weights, to start from or to use: of a run, a Hugging Face folder, or a `.pth` of MiniMind's.

`open_model` returns a model with its tokenizer, for generation and evaluation. The checkpoints of a run that trains adapters hold only
these; the weights beside them are those that the run began from.
"""

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minimind_data.dataset.format import TOKENIZER_NAME, TokenizerInfo
from minimind_data.errors import UserError
from minimind_data.options import flatten, options_from, options_in_file
from minimind_data.tokenizer.loading import Tokenizer, load_tokenizer
from minimind_data.tokenizer.places import SHIPPED, place_of
from minimind_train.model.config import LoraConfig, ModelConfig, trained_parameters
from minimind_train.model.lora import add_adapters, merge_adapters
from minimind_train.model.transformer import MiniMind
from minimind_train.progress import Say, say_on_stderr
from minimind_train.resume_policy import Resume, names_of
from minimind_train.run_folder.checkpoint import STATE_NAME, Checkpoint
from minimind_train.run_folder.checkpoint_choice import with_checkpoint
from minimind_train.run_folder.options import CheckpointChoice
from minimind_train.run_folder.places import with_present_places
from minimind_train.run_folder.record import RESTORE, RUN_CONFIG_NAME, RunRecord, load_run_tokenizer
from minimind_train.weights.file_shape import shape_of_file
from minimind_train.weights.foreign import (
    ResumePoint,
    is_hf_folder,
    num_entries,
    parameters_of_model,
    read_hf_folder,
    read_tensors,
    read_weights_file,
    split_experts,
)
from minimind_train.weights.lora_form import merged_with, split_adapters
from minimind_train.weights.options import StartOptions


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A trained model, ready for use."""

    model: MiniMind
    """On the CPU, in evaluation mode."""
    tokenizer: Tokenizer
    record: RunRecord | None
    """The run's record; None for weights that are no run's."""
    step: int | None
    """The step of the checkpoint; None for weights that are no run's."""
    name: str
    """What people call it: the name of its folder, or of its file without the ending."""
    tokenizer_folder: Path
    """The folder with its tokenizer and, where there is one, its chat template."""


_SUFFIXES = {".pth", ".pt", ".bin", ".safetensors"}
"""How names of files with weights end; what torch.save writes is a zip file, whatever it is called."""


def open_model(
    path: Path,
    *,
    step: CheckpointChoice,
    say: Say,
    changes: Mapping[str, Any] = MappingProxyType({}),
    tokenizer: Path | str | None = None,
    lora: Path | str | None = None,
) -> TrainedModel:
    """Open the model of a run, of a Hugging Face folder, or of a file of weights such as MiniMind's `.pth`.

    Args:
        path: of any of these; a run may still be training.
        step: of a run, whose checkpoint; the newest whole one by default, or `best`.
        say: takes a sentence on each damaged checkpoint, and on what was taken for granted about a file of weights.
        changes: options of the model: of a folder those to change, such as those of its positions; of a file those that its tensors
            do not tell.
        tokenizer: of weights that are no run's, where it is not in the folder, beside the file, or MiniMind's own.
        lora: a file of MiniMind's adapters, which are merged into the weights.

    Raises:
        UserError: there is no such model, or nothing that says which token ends a text.
    """
    if path.is_file() and (path.suffix in _SUFFIXES or zipfile.is_zipfile(path)):
        trained = _open_file(path, step=step, say=say, options=changes, tokenizer=tokenizer)
    elif is_hf_folder(path):
        trained = _open_hf_folder(path, step=step, say=say, changes=changes, tokenizer=tokenizer)
    else:
        trained = _open_run(path, step=step, say=say, changes=changes, tokenizer=tokenizer)
    if lora is not None:
        _, adapters = split_adapters(read_tensors(Path(lora)))
        trained.model.load_state_dict(merged_with(trained.model.state_dict(), adapters, Path(lora)))
    return trained


def _open_run(
    path: Path,
    *,
    step: CheckpointChoice,
    say: Say,
    changes: Mapping[str, Any],
    tokenizer: Path | str | None,
) -> TrainedModel:
    if path.suffix in _SUFFIXES and not path.exists():
        raise UserError("no such file", where=path, remedy="correct the name", option="run")
    record = RunRecord.read(path)
    if tokenizer is not None:
        raise UserError(
            "is a run, which knows its tokenizer",
            where=path,
            remedy="leave `tokenizer` out",
            option="tokenizer",
        )
    model, step = _model_and_step_of(path, step, say, changes)
    return TrainedModel(
        model=model,
        tokenizer=load_run_tokenizer(path, record.tokenizer),
        record=record,
        step=step,
        name=path.resolve().name,
        tokenizer_folder=path,
    )


def _open_hf_folder(
    path: Path,
    *,
    step: CheckpointChoice,
    say: Say,
    changes: Mapping[str, Any],
    tokenizer: Path | str | None,
) -> TrainedModel:
    _refuse_step(path, step, "checkpoint")
    place = path if tokenizer is None else place_of(tokenizer)
    try:
        loaded_tokenizer = load_tokenizer(place)
    except UserError as error:
        if tokenizer is not None:
            raise
        why = str(error).partition(";")[0]
        raise UserError(
            why, remedy="put it into the folder, or into its tokenizer_config.json, or pass `tokenizer`"
        ) from None
    weights = load_weights(path, say=say)
    model = MiniMind(_changed(weights.config, changes, path)).eval()
    model.load_state_dict(weights.tensors)
    _refuse_small_vocabulary(model.config, loaded_tokenizer, path)
    return TrainedModel(
        model=model,
        tokenizer=loaded_tokenizer,
        record=None,
        step=None,
        name=path.resolve().name,
        tokenizer_folder=_folder_of(place),
    )


def _open_file(
    path: Path,
    *,
    step: CheckpointChoice,
    say: Say,
    options: Mapping[str, Any],
    tokenizer: Path | str | None,
) -> TrainedModel:
    _refuse_step(path, step, "checkpoint")
    tensors, _ = read_weights_file(path)
    tensors = _without_adapters(split_experts(tensors, path), path)
    shape = shape_of_file(tensors, options, path)
    parameters = parameters_of_model(tensors, shape.config, path)
    beside = tokenizer_beside(path)
    if tokenizer is not None:
        place, which = place_of(tokenizer), ""
    elif beside.is_dir():
        place, which = beside, f"; tokenizer {beside}"
    else:
        place, which = SHIPPED[shape.tokenizer], f"; tokenizer {shape.tokenizer}"
    say(
        f"{path}: {shape.in_words}{which}; where that is wrong, pass the model's options{' or `tokenizer`' if which else ''}"
    )
    loaded_tokenizer = load_tokenizer(place)
    _refuse_small_vocabulary(shape.config, loaded_tokenizer, path)
    if tokenizer is None and loaded_tokenizer.info.vocab_size != shape.config.vocab_size:
        raise UserError(
            f"has {shape.config.vocab_size:,} entries of a vocabulary, and the tokenizer {shape.tokenizer} "
            f"{loaded_tokenizer.info.vocab_size:,}",
            where=path,
            remedy="pass its own by `tokenizer`",
            option="tokenizer",
        )
    model = MiniMind(shape.config).eval()
    model.load_state_dict(parameters)
    return TrainedModel(
        model=model,
        tokenizer=loaded_tokenizer,
        record=None,
        step=None,
        name=path.stem,
        tokenizer_folder=_folder_of(place),
    )


def tokenizer_beside(path: Path) -> Path:
    """Return the folder in which the tokenizer of a file of weights is, where it is not MiniMind's own."""
    return path.with_name(f"{path.stem}_tokenizer")


def _folder_of(tokenizer: Path) -> Path:
    return tokenizer if tokenizer.is_dir() else tokenizer.parent


def _refuse_small_vocabulary(config: ModelConfig, tokenizer: Tokenizer, path: Path) -> None:
    if tokenizer.info.vocab_size > config.vocab_size:
        raise UserError(
            f"has {config.vocab_size:,} entries of a vocabulary, and the tokenizer {tokenizer.info.vocab_size:,}",
            where=path,
            remedy="pass its own by `tokenizer`",
            option="tokenizer",
        )


def _refuse_step(path: Path, step: CheckpointChoice, option: str) -> None:
    if step is not None:
        raise UserError(
            "is no run, so it has no checkpoint of a step",
            where=path,
            remedy=f"leave `{option}` out",
            option=option,
        )


def _changed(config: ModelConfig, changes: Mapping[str, Any], where: Path) -> ModelConfig:
    """Return a shape with some options changed, of those with which the same weights still fit.

    Raises:
        UserError: the weights decide about one of them, or its value is not possible.
    """
    there = flatten(config.resolved())
    for name in sorted(changes.keys() & names_of(ModelConfig, Resume.SHAPE)):
        if changes[name] != there[name]:
            raise UserError(
                f"its {name} is {there[name]}, and `{name}` says {changes[name]}",
                where=where,
                remedy=f"the weights decide the shape of the model, so leave `{name}` out",
                option=name,
            )
    try:
        return options_from(ModelConfig, {**flatten(config), **changes})
    except ValueError as error:
        raise UserError(f"its model cannot be used like that: {error}", where=where) from None


def _without_adapters(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the tensors of a model; adapters of MiniMind's that are among them are merged into it."""
    weights, adapters = split_adapters(tensors)
    if adapters and not weights:
        raise UserError(
            "holds adapters alone",
            where=path,
            remedy="pass the weights that they belong to by `run` and this by `lora`; to train on from both, "
            "write them as one first, by `mm-train export`",
        )
    return merged_with(weights, adapters, path) if adapters else weights


class Weights(NamedTuple):
    """The weights of a model, and what is current_options about it."""

    config: ModelConfig
    """Its shape, resolved."""
    tensors: dict[str, Tensor]
    """By parameter name, float32 on the CPU: what a `MiniMind` of this shape loads."""
    tokenizer: TokenizerInfo | None
    """The tokenizer that it was trained with; None where the files do not say."""
    step: int | None = None
    """The step of the checkpoint, where the weights are a run's."""
    tokenizer_json: str | None = None
    """The text of the tokenizer.json beside the weights, where there is one."""
    resume_point: ResumePoint | None = None
    """Where MiniMind stood when it wrote them, in a resume file of its."""


def load_weights(
    path: Path,
    *,
    step: CheckpointChoice = None,
    shape: ModelConfig | None = None,
    say: Say = say_on_stderr,
) -> Weights:
    """Load trained weights.

    Args:
        path: the folder of a run, a Hugging Face folder, or a file that holds nothing but tensors by name, such as MiniMind's `.pth`.
        step: of a run, whose checkpoint.
        shape: the shape of the model, for a file of weights, which does not say it; only the size of the vocabulary is the file's.
        say: takes a sentence on each damaged checkpoint.

    Raises:
        UserError: there are no weights, or no checkpoint of that step, or they are of another model than this program's or `shape`.
    """
    if path.is_file() or is_hf_folder(path):
        _refuse_step(path, step, "from_step")
    if path.is_file():
        return _of_file(path, shape)
    if is_hf_folder(path):
        return _of_hf_folder(path)
    if not (path / RUN_CONFIG_NAME).is_file():
        problem = "no weights there" if path.exists() else "no such folder"
        raise UserError(
            problem,
            where=path,
            remedy="pass the folder of a run, a Hugging Face folder on this machine or a .pth by "
            "`from_weight`",
            option="from_weight",
        )
    tokenizer = RunRecord.read(path).tokenizer
    model, step = _model_and_step_of(path, step, say, {})
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return Weights(
        config=model.config.resolved(),
        tensors=tensors,
        tokenizer=tokenizer,
        step=step,
        tokenizer_json=_text_of(path / TOKENIZER_NAME),
    )


def load_initial_weights(start: StartOptions, shape: ModelConfig, why: str, say: Say) -> Weights:
    """Load the weights that a run began from.

    Args:
        start: the run's options that name them.
        shape: of the run's model, for a file of weights, which does not say it.
        why: what they are needed for, such as `the run has no checkpoint yet`.
        say: takes a sentence on each damaged checkpoint.

    Raises:
        UserError: they are gone, or have changed.
    """
    path, checksum = start.from_weight, start.from_sha256
    need = f"{why}, so it needs the weights that it began from"
    if path is None or checksum is None:
        raise UserError(f"{need}, and its record names none", remedy="bring the record back from a backup")
    try:
        weights = load_weights(Path(path), step=start.from_step, shape=shape, say=say)
    except UserError as error:
        raise UserError(
            f"{need}, and these are gone ({error})",
            remedy="put them back, or say where they are by `resume` with `from_weight`",
            option="from_weight",
        ) from None
    if (actual := checksum_of_tensors(weights.tensors)) != checksum:
        raise UserError(
            f"{need}, and {path} holds others (in the run: {checksum[:12]}…, there: {actual[:12]}…)",
            remedy="say where they are by `resume` with `from_weight`, and with `from_step` where they are no newest "
            "checkpoint",
            option="from_weight",
        )
    return weights


def model_of(
    run: Path, *, step: CheckpointChoice, say: Say, changes: Mapping[str, Any] = MappingProxyType({})
) -> MiniMind:
    """Return the model of a run, on the CPU, in evaluation mode, with its adapters merged into the matrices that they adapt.

    Args:
        run: its folder.
        step: whose checkpoint.
        say: takes a sentence on each damaged checkpoint.
        changes: options of the model to change, such as those of its positions.

    Raises:
        UserError: there is no such checkpoint, or no such model, or the weights that its adapters belong to are gone.
    """
    return _model_and_step_of(run, step, say, changes)[0]


def adapted_model(run: Path, *, step: CheckpointChoice, say: Say) -> tuple[MiniMind, LoraConfig]:
    """Return the model of a run with its adapters not merged, and their options.

    Raises:
        UserError: as `model_of`, or the run has trained all weights.
    """

    def restore(checkpoint: Checkpoint) -> tuple[MiniMind, LoraConfig]:
        _, lora = model_options(checkpoint)
        if not lora.lora_rank:
            raise UserError(
                "has no adapters, since it was trained without `lora_rank`", where=run, option="lora_rank"
            )
        return _restore(checkpoint, {}, say), lora

    return with_checkpoint(run, step, restore, say)


def _model_and_step_of(
    run: Path, step: CheckpointChoice, say: Say, changes: Mapping[str, Any]
) -> tuple[MiniMind, int]:
    def restore(checkpoint: Checkpoint) -> tuple[MiniMind, int]:
        model = _restore(checkpoint, changes, say)
        merge_adapters(model)
        return model, checkpoint.state.step

    return with_checkpoint(run, step, restore, say)


def _restore(checkpoint: Checkpoint, changes: Mapping[str, Any], say: Say) -> MiniMind:
    config, lora = model_options(checkpoint)
    config = _changed(config, changes, checkpoint.folder)
    checkpoint.refuse_larger_model(trained_parameters(config, lora))
    if not lora.lora_rank:
        model = MiniMind(config).eval()
        checkpoint.restore(model)
        return model
    # Their place may have changed since the checkpoint was written; the weights have not.
    run = checkpoint.folder.parents[1]
    record = with_present_places(RunRecord.read(run), run, say, names=("from_weight",))
    current_options = {**checkpoint.state.config, **record.options}
    start = options_in_file(StartOptions, current_options, run / RUN_CONFIG_NAME, remedy=RESTORE)
    weights = load_initial_weights(start, config, f"{checkpoint.folder} holds adapters alone", say)
    parameters = parameters_of_model(weights.tensors, config, checkpoint.folder)
    model = MiniMind(config).eval()
    model.load_state_dict(parameters)
    try:
        add_adapters(model, lora, seed=0)
    except ValueError as error:
        raise UserError(f"its model cannot be used like that: {error}", where=checkpoint.folder) from None
    checkpoint.restore(model)
    return model


def model_options(checkpoint: Checkpoint) -> tuple[ModelConfig, LoraConfig]:
    """Return the shape of the model of a checkpoint, and its adapters.

    Raises:
        UserError: its state.json says something else there.
    """
    options, path = checkpoint.state.config, checkpoint.folder / STATE_NAME
    return options_in_file(ModelConfig, options, path), options_in_file(LoraConfig, options, path)


def _of_file(path: Path, shape: ModelConfig | None) -> Weights:
    if shape is None:
        raise UserError(
            "a file of weights does not say of which model", where=path, remedy="pass a folder that does"
        )
    tensors, point = read_weights_file(path)
    tensors = _without_adapters(tensors, path)
    config = replace(shape, vocab_size=num_entries(tensors, path)).resolved()
    parameters = parameters_of_model(tensors, config, path)
    info, text = _tokenizer_in(tokenizer_beside(path))
    return Weights(config=config, tensors=parameters, tokenizer=info, tokenizer_json=text, resume_point=point)


def _of_hf_folder(path: Path) -> Weights:
    config, tensors = read_hf_folder(path)
    info, text = _tokenizer_in(path)
    return Weights(config=config, tensors=tensors, tokenizer=info, tokenizer_json=text)


def _tokenizer_in(folder: Path) -> tuple[TokenizerInfo | None, str | None]:
    """Return what is known of the tokenizer in a folder, and the text of its tokenizer.json; None where there is none."""
    text = _text_of(folder / TOKENIZER_NAME)
    if text is None:
        return None, None
    try:
        return load_tokenizer(folder).info, text
    except UserError:
        return None, text  # the vocabulary is known all the same, only BOS, EOS or PAD are not


def _text_of(path: Path) -> str | None:
    try:
        return path.read_bytes().decode()
    except (FileNotFoundError, UnicodeDecodeError):
        return None


def checksum_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the hexadecimal SHA-256 of weights, over names, shapes and bits; the form of the file does not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
