"""Weights that were trained before, from wherever a run can begin: another run, a Hugging Face folder, a `.pth` of MiniMind's."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minimind_data.errors import UserError
from minimind_data.format import TOKENIZER_NAME, TokenizerInfo
from minimind_data.tokenizer import load_tokenizer
from minimind_train.foreign_weights import fitted, is_hf_folder, num_entries, read_hf_folder, read_tensors
from minimind_train.model_config import ModelConfig
from minimind_train.progress import Say, say_on_stderr
from minimind_train.runs import CONFIG_NAME, RunRecord
from minimind_train.trained import model_and_step_of

__all__ = ["Weights", "checksum_of_tensors", "load_weights"]


class Weights(NamedTuple):
    """The weights of a model, and what is known of it."""

    config: ModelConfig
    """Its shape, resolved."""
    tensors: dict[str, Tensor]
    """By parameter name, float32 on the CPU: what a `MiniMind` of this shape loads."""
    tokenizer: TokenizerInfo | None
    """What it was trained with; None where the files do not say."""
    step: int | None = None
    """Of the checkpoint, where they are a run's."""
    tokenizer_json: str | None = None
    """The tokenizer.json beside the weights, where there is one."""


def load_weights(
    path: Path,
    *,
    step: int | None = None,
    shape: ModelConfig | None = None,
    say: Say = say_on_stderr,
) -> Weights:
    """Return weights that were trained before.

    Args:
        path: the folder of a run, a Hugging Face folder, or a file that holds nothing but tensors by name, such as MiniMind's `.pth`.
        step: of a run, whose checkpoint; the newest whole one by default.
        shape: of the model whose weights a file holds, which does not say it itself; the size of its vocabulary is the file's.
        say: is told of damaged checkpoints.

    Raises:
        UserError: there are no weights, or no checkpoint of that step, or they are of another model than this program's or `shape`.
    """
    if step is not None and (path.is_file() or is_hf_folder(path)):
        raise UserError(f"{path}: is no run, so it has no checkpoint of a step; leave --from-step out")
    if path.is_file():
        return _of_file(path, shape)
    if is_hf_folder(path):
        return _of_hf_folder(path)
    if not (path / CONFIG_NAME).is_file():
        there = "no weights there" if path.exists() else "no such folder"
        raise UserError(
            f"{path}: {there}; pass the folder of a run, a Hugging Face folder on this machine or a .pth by --from-weight"
        )
    tokenizer = RunRecord.read(path).tokenizer
    model, step = model_and_step_of(path, step=step, say=say)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return Weights(
        config=model.config.resolved(),
        tensors=tensors,
        tokenizer=tokenizer,
        step=step,
        tokenizer_json=_text_of(path / TOKENIZER_NAME),
    )


def _of_file(path: Path, shape: ModelConfig | None) -> Weights:
    if shape is None:
        raise UserError(f"{path}: a file of weights does not say of which model; pass a folder that does")
    tensors = read_tensors(path)
    config = replace(shape, vocab_size=num_entries(tensors, path)).resolved()
    return Weights(config=config, tensors=fitted(tensors, config, path), tokenizer=None)


def _of_hf_folder(path: Path) -> Weights:
    config, tensors = read_hf_folder(path)
    text = _text_of(path / TOKENIZER_NAME)
    info: TokenizerInfo | None = None
    if text is not None:
        try:
            info = load_tokenizer(path).info
        except UserError:
            info = None  # a vocabulary without BOS, EOS or PAD is one all the same
    return Weights(config=config, tensors=tensors, tokenizer=info, tokenizer_json=text)


def _text_of(path: Path) -> str | None:
    try:
        return path.read_bytes().decode()
    except (FileNotFoundError, UnicodeDecodeError):
        return None


def checksum_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the hexadecimal SHA-256 of weights: their names, shapes and bits, in whatever file they lie."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
