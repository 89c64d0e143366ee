"""The model of a run in a form that other programs open: a Hugging Face folder, or a `.pth` of MiniMind's.

`hf_config` and `minimind_form` say what each can hold; here it is written, whole or not at all.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minimind_data.errors import UserError
from minimind_data.files import disk_full_is_plain, fsync_folder, partial_name
from minimind_data.format import CONFIG_NAME as TOKENIZER_CONFIG_NAME
from minimind_data.format import TOKENIZER_NAME, TokenizerInfo
from minimind_data.tokenizer import Tokenizer
from minimind_train.hf_config import to_hf
from minimind_train.minimind_form import file_name, minimind_form
from minimind_train.model import MiniMind
from minimind_train.model_config import ModelConfig, parameter_line
from minimind_train.progress import Say, say_on_stderr
from minimind_train.runs import RunRecord, load_run_tokenizer
from minimind_train.trained import Which, model_of

__all__ = ["Target", "WeightDtype", "export"]

Target = Literal["hf", "minimind"]
WeightDtype = Literal["fp32", "bf16", "fp16"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_USUAL_DTYPE: dict[Target, WeightDtype] = {"hf": "fp32", "minimind": "fp16"}


def export(
    run: Path,
    out: Path,
    *,
    to: Target,
    step: Which = None,
    dtype: WeightDtype | None = None,
    say: Say = say_on_stderr,
) -> Path:
    """Write the model of a run in another program's form.

    Args:
        run: its folder.
        out: a folder that is new or empty; for MiniMind any folder, or the `.pth` itself.
        to: hf for a folder that transformers opens; minimind for a `.pth` that MiniMind's code opens.
        step: whose checkpoint; the newest whole one by default, or `best`.
        dtype: of the weights; fp32 for hf, and fp16 for minimind, as MiniMind stores them.
        say: takes lines for the user.

    Returns:
        What was written.

    Raises:
        UserError: the form cannot hold this model, or cannot be written there.
    """
    record = RunRecord.read(run)
    model = model_of(run, step=step, say=say)
    dtype = dtype or _USUAL_DTYPE[to]
    if model.config.dropout:
        say(f"dropout {model.config.dropout} is of training alone and is not exported")
    weights = _cast(model, dtype, run)
    if to == "minimind":
        return _to_minimind(out, record, model, weights, say)
    return _to_hf(out, run, record=record, config=model.config, weights=weights, say=say)


def _cast(model: MiniMind, dtype: WeightDtype, run: Path) -> dict[str, Tensor]:
    weights = {
        name: tensor.detach().to(_DTYPES[dtype]).contiguous() for name, tensor in model.state_dict().items()
    }
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{run}: {name} holds numbers that {dtype} cannot; export it with --dtype fp32, or take an earlier --checkpoint"
            )
    return weights


def _to_minimind(out: Path, record: RunRecord, model: MiniMind, weights: dict[str, Tensor], say: Say) -> Path:
    form = minimind_form(model.config)
    path = out if out.suffix == ".pth" else out / file_name(record.command, model.config)
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    with _whole(path, Path.unlink) as partial:
        torch.save(weights, partial)
        _flush(partial)
    say(f"{path}: {parameter_line(model.config)}, for the code of {form.generation}: {form.call}")
    return path


def _to_hf(
    out: Path,
    run: Path,
    *,
    record: RunRecord,
    config: ModelConfig,
    weights: dict[str, Tensor],
    say: Say,
) -> Path:
    tokenizer = load_run_tokenizer(run, record.tokenizer)
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    told = to_hf(config, record.tokenizer, dtype)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already; take another --out, or remove it")
    with _whole(out, shutil.rmtree) as partial:
        partial.mkdir()
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        (partial / TOKENIZER_NAME).write_text(tokenizer.json, encoding="utf-8")
        special = {name: told[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        for name, content in (
            ("config.json", told),
            ("generation_config.json", special),
            (TOKENIZER_CONFIG_NAME, _tokenizer_config(run, tokenizer, record.tokenizer, config)),
        ):
            text = json.dumps(content, ensure_ascii=False, indent=2)
            (partial / name).write_text(text + "\n", encoding="utf-8")
        for file in partial.iterdir():
            shutil.copymode(partial / "config.json", file)  # safetensors lets nobody else read what it writes
            _flush(file)
        if out.exists():
            out.rmdir()
    say(f"{out}: {parameter_line(config)} as {told['architectures'][0]} in {dtype}")
    return out


def _tokenizer_config(
    run: Path, tokenizer: Tokenizer, info: TokenizerInfo, config: ModelConfig
) -> dict[str, Any]:
    """Return the tokenizer_config.json of a folder: its special tokens and, where the run has one, its chat template."""
    there = run / TOKENIZER_CONFIG_NAME
    told: dict[str, Any] = {}
    if there.is_file():
        try:
            told = dict(json.loads(there.read_bytes()))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{there}: no object in JSON ({error}); copy it from the dataset again") from None
    tokens = {"bos_token": info.bos_id, "eos_token": info.eos_id, "pad_token": info.pad_id}
    return {
        **told,
        **{name: tokenizer.reference.id_to_token(number) for name, number in tokens.items()},
        # By its own name, or transformers would make one after the type of the model, with other rules.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.longest_sequence,
    }


@contextmanager
def _whole(path: Path, remove: Callable[[Path], object]) -> Iterator[Path]:
    """Give a name beside `path` to write to, and rename it when all is done; what failed is removed."""
    with disk_full_is_plain(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_name(path)
        try:
            yield partial
            partial.replace(path)
        except BaseException as error:
            if partial.exists():
                remove(partial)
            if isinstance(error, SafetensorError | RuntimeError):  # how these libraries tell of a full disk
                raise UserError(
                    f"{path}: could not be written ({str(error).partition(chr(10))[0]}); make room on the disk, or take another --out"
                ) from None
            raise
        fsync_folder(path.parent)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
