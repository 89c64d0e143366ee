"""Trained weights, to start from or to use: of a run, a Hugging Face folder, or a `.pth` of MiniMind's.

`open_model` returns a model with its tokenizer, for generation and evaluation. The checkpoints of a run that trains adapters hold only
these; the weights beside them are those that the run began from.
"""

import hashlib
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
from minimind_train.model.config import LoraConfig, ModelConfig, trained_parameters
from minimind_train.model.lora import add_adapters, merge_adapters
from minimind_train.model.transformer import MiniMind
from minimind_train.progress import Say, say_on_stderr
from minimind_train.run_folder.checkpoint import STATE_NAME, Checkpoint
from minimind_train.run_folder.checkpoint_choice import with_checkpoint
from minimind_train.run_folder.options import CheckpointChoice
from minimind_train.run_folder.places import with_present_places
from minimind_train.run_folder.record import RESTORE, RUN_CONFIG_NAME, RunRecord, load_run_tokenizer
from minimind_train.weights.foreign import (
    is_hf_folder,
    num_entries,
    parameters_of_model,
    read_hf_folder,
    read_tensors,
)
from minimind_train.weights.options import StartOptions


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A trained model, ready for use."""

    model: MiniMind
    """On the CPU, in evaluation mode."""
    tokenizer: Tokenizer
    record: RunRecord | None
    """The run's record; None for a Hugging Face folder."""
    step: int | None
    """The step of the checkpoint; None for a Hugging Face folder."""


def open_model(
    path: Path,
    *,
    step: CheckpointChoice,
    say: Say,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> TrainedModel:
    """Open the model of a run or of a Hugging Face folder.

    Args:
        path: its folder; a run may still be training.
        step: of a run, whose checkpoint; the newest whole one by default, or `best`.
        say: takes a sentence on each damaged checkpoint.
        changes: options of the model to change, such as those of its positions.

    Raises:
        UserError: there is no such model, or nothing that says which token ends a text.
    """
    if not is_hf_folder(path):
        record = RunRecord.read(path)
        model, step = _model_and_step_of(path, step, say, changes)
        tokenizer = load_run_tokenizer(path, record.tokenizer)
        return TrainedModel(model=model, tokenizer=tokenizer, record=record, step=step)
    if step is not None:
        raise UserError(
            "is no run, so it has no checkpoint of a step",
            where=path,
            remedy="leave `checkpoint` out",
            option="checkpoint",
        )
    try:
        tokenizer = load_tokenizer(path)
    except UserError as error:
        why = str(error).partition(";")[0]
        raise UserError(why, remedy="put it into the folder, or into its tokenizer_config.json") from None
    weights = load_weights(path, say=say)
    try:
        config = options_from(ModelConfig, {**flatten(weights.config), **changes})
    except ValueError as error:
        raise UserError(f"its model cannot be used like that: {error}", where=path) from None
    model = MiniMind(config).eval()
    model.load_state_dict(weights.tensors)
    return TrainedModel(model=model, tokenizer=tokenizer, record=None, step=None)


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
    if step is not None and (path.is_file() or is_hf_folder(path)):
        raise UserError(
            "is no run, so it has no checkpoint of a step",
            where=path,
            remedy="leave `from_step` out",
            option="from_step",
        )
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
    try:
        config = options_from(ModelConfig, {**flatten(config), **changes})
    except ValueError as error:
        raise UserError(f"its model cannot be used like that: {error}", where=checkpoint.folder) from None
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
    tensors = read_tensors(path)
    config = replace(shape, vocab_size=num_entries(tensors, path)).resolved()
    return Weights(config=config, tensors=parameters_of_model(tensors, config, path), tokenizer=None)


def _of_hf_folder(path: Path) -> Weights:
    config, tensors = read_hf_folder(path)
    text = _text_of(path / TOKENIZER_NAME)
    info: TokenizerInfo | None = None
    if text is not None:
        try:
            info = load_tokenizer(path).info
        except UserError:
            info = None  # the vocabulary is current_options all the same, only BOS, EOS or PAD are not
    return Weights(config=config, tensors=tensors, tokenizer=info, tokenizer_json=text)


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
