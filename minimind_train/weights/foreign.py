"""Weights that other programs wrote: a Hugging Face folder, a `.pth` of MiniMind's, a file of safetensors.

No code in a file is ever run: pickles are read by torch's `weights_only` reader, which accepts only tensors and containers.
Parameters have the same names there as here, so little remains to be done: join shards, split stacked experts, leave out
what is not a parameter, and compare names and shapes with the model's, because a file that almost fits belongs to another model.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from minimind_data.errors import UserError
from minimind_data.files import parse_json
from minimind_data.json_fields import is_file_name
from minimind_train.model.config import ModelConfig
from minimind_train.model.transformer import MiniMind
from minimind_train.weights.hf_config import from_hf

__all__ = [
    "EMBEDDING_NAME",
    "HEAD_NAME",
    "HF_CONFIG_NAME",
    "ResumePoint",
    "is_hf_folder",
    "num_entries",
    "parameters_of_model",
    "read_hf_folder",
    "read_tensors",
    "read_weights_file",
    "split_experts",
]

HF_CONFIG_NAME = "config.json"
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_FILES = ("model.safetensors", "pytorch_model.bin")
_NO_PARAMETERS = ("rotary_emb.inv_freq", "freqs_cos", "freqs_sin")
HEAD_NAME, EMBEDDING_NAME = "lm_head.weight", "model.embed_tokens.weight"
_GATE_UP, _DOWN = ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"


def is_hf_folder(path: Path) -> bool:
    """Tell whether a folder has a config.json of Hugging Face's; that of a run has no `model_type`."""
    try:
        content = parse_json((path / HF_CONFIG_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "model_type" in content


def read_hf_folder(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the shape of the model in a Hugging Face folder, and its weights in float32 by our names.

    Raises:
        UserError: the model is of another type, or something is missing or damaged.
    """
    source = folder / HF_CONFIG_NAME
    try:
        content = parse_json(source.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read ({error})", where=source) from None
    if not isinstance(content, dict):
        raise UserError("no JSON object", where=source)
    config = from_hf(content, str(source))
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        tensors |= read_tensors(file)
    return config.resolved(), parameters_of_model(tensors, config, folder)


def _weight_files(folder: Path) -> list[Path]:
    for name in _INDEXES:
        index = folder / name
        if index.is_file():
            try:
                parts = sorted(set(parse_json(index.read_bytes())["weight_map"].values()))
                names_files = all(map(is_file_name, parts))
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                names_files = False
            if not names_files:
                raise UserError("does not say which file holds which weight", where=index)
            return [folder / part for part in parts]
    for name in _FILES:
        if (folder / name).is_file():
            return [folder / name]
    raise UserError(f"holds no weights ({', '.join((*_FILES, *_INDEXES))} are looked for)", where=folder)


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """Where a run of MiniMind's stood when it wrote its `*_resume.pth`."""

    epoch: int
    """Whole epochs before it."""
    step: int
    """Micro-batches of each process in this epoch."""
    processes: int


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name: of safetensors, by the suffix, else of what `torch.save` wrote, also MiniMind's resume files.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    return read_weights_file(path)[0]


def read_weights_file(path: Path) -> tuple[dict[str, Tensor], ResumePoint | None]:
    """Return the tensors of a file as `read_tensors` does, and where training stood if it is a resume file of MiniMind's.

    Raises:
        UserError: as `read_tensors`.
    """
    try:
        loaded = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except FileNotFoundError:
        raise UserError("no such file", where=path) from None
    except pickle.UnpicklingError:
        raise UserError(
            "holds more than tensors, or is no file of torch.save",
            where=path,
            remedy="such a file could run code, so it is not read; save its state_dict() alone",
        ) from None
    except Exception as error:  # noqa: BLE001 - torch says nowhere what it raises for a file that is cut off or made up
        why = str(error).partition("\n")[0] or "it is empty or cut off"
        raise UserError(f"cannot be read ({why})", where=path) from None
    point = None
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):
        point = _resume_point(loaded)
        loaded = loaded["model"]
    if not (
        isinstance(loaded, dict)
        and loaded
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in loaded.items())
    ):
        raise UserError("is no state_dict, which is a tensor for each name", where=path)
    for name, tensor in loaded.items():
        if not name.endswith(_NO_PARAMETERS) and not _is_plain(tensor):
            raise UserError(
                f"{name} is no plain tensor of real numbers",
                where=path,
                remedy="save the weights again, as dense float32, float16 or bfloat16",
            )
    return loaded, point


def _is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor is dense, and holds real numbers that are there."""
    is_dense = tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_quantized)
    return is_dense and not tensor.is_meta and not tensor.is_complex()


def _resume_point(content: Mapping[str, Any]) -> ResumePoint | None:
    """Return where training stood, from what `torch.load` gives of a resume file; None where it holds no optimizer or says other things."""
    epoch, step, processes = (content.get(name) for name in ("epoch", "step", "world_size"))
    processes = 1 if processes is None else processes
    if "optimizer" not in content:
        return None
    if not (isinstance(epoch, int) and isinstance(step, int) and isinstance(processes, int)):
        return None
    return ResumePoint(epoch=epoch, step=step, processes=processes) if min(epoch, step) >= 0 else None


def num_entries(tensors: Mapping[str, Tensor], source: Path) -> int:
    """Return the size of the vocabulary, which is the height of the embedding matrix.

    Raises:
        UserError: there is no embedding matrix of the name that it has here.
    """
    embedding = tensors.get(EMBEDDING_NAME)
    if embedding is None or embedding.ndim != 2 or not embedding.shape[0]:
        raise UserError(
            f"has no {EMBEDDING_NAME}, so it holds no model of MiniMind's since minimind2, nor one of Hugging "
            "Face's",
            where=source,
        )
    return embedding.shape[0]


def parameters_of_model(
    tensors: Mapping[str, Tensor], config: ModelConfig, source: Path
) -> dict[str, Tensor]:
    """Return the parameters of a model of this shape, in float32, by name, out of the tensors of a file.

    Args:
        tensors: by the names that Hugging Face and MiniMind give them.
        config: the shape, with the `vocab_size` of the tensors.
        source: where they come from, for the error.

    Raises:
        UserError: they belong to another model; the message names the first difference.
    """
    parameters = split_experts(
        {name: tensor for name, tensor in tensors.items() if not name.endswith(_NO_PARAMETERS)}, source
    )
    if config.tie_word_embeddings and HEAD_NAME in parameters:
        embedding = parameters.get(EMBEDDING_NAME)
        if embedding is None or not torch.equal(parameters.pop(HEAD_NAME), embedding):
            raise UserError(
                "its output matrix is not its embedding matrix",
                where=source,
                remedy="pass `tie_word_embeddings=False`",
                option="tie_word_embeddings",
            )
    with torch.device("meta"):
        expected = MiniMind(config).state_dict()
    for name in sorted(expected.keys() | parameters.keys()):
        sides = [list(side[name].shape) if name in side else "absent" for side in (parameters, expected)]
        if sides[0] != sides[1]:
            raise UserError(
                f"the weights belong to another model: {name} is {sides[0]} there and {sides[1]} in a model "
                "of these options",
                where=source,
                remedy="pass the options that it was made with, such as `hidden_size`, `num_hidden_layers`, "
                "`qk_norm=False`, `use_moe` or a `preset`",
            )
    return {name: parameters[name].float() for name in expected}


def split_experts(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Split the experts, which transformers 5 keeps in one tensor for each layer, gate above up.

    Raises:
        UserError: they have another shape.
    """
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith((_GATE_UP, _DOWN)) and (
            tensor.ndim != 3 or (name.endswith(_GATE_UP) and tensor.shape[1] % 2)
        ):
            raise UserError(
                f"{name} is {list(tensor.shape)}, which are no stacked experts: it should have three dimensions, and gate above up",
                where=source,
                remedy="save the weights again",
            )
        if name.endswith(_GATE_UP):
            prefix = name.removesuffix("gate_up_proj")
            for number, both in enumerate(tensor):
                gate, up = both.chunk(2)
                split[f"{prefix}{number}.gate_proj.weight"] = gate
                split[f"{prefix}{number}.up_proj.weight"] = up
        elif name.endswith(_DOWN):
            prefix = name.removesuffix("down_proj")
            split |= {f"{prefix}{number}.down_proj.weight": down for number, down in enumerate(tensor)}
        else:
            split[name] = tensor
    return split
