"""export(): a model in a form that other programs open: a Hugging Face folder, a `.pth` of MiniMind's, a `.gguf`, or adapters.

`hf_config`, `minimind_form`, `gguf_form` and `peft_form` say what each form can hold; here it is written, whole or not at all. Adapters are merged
into their matrices, except for peft and for MiniMind's own file of them. Each brings the tokenizer that the weights need.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minimind_data.chat.template import chat_template_of
from minimind_data.dataset.format import TEMPLATE_NAME, TOKENIZER_CONFIG_NAME, TOKENIZER_NAME
from minimind_data.dataset.occupancy import has_content, refuse_replacing
from minimind_data.dataset.staging import new_folder
from minimind_data.errors import UserError
from minimind_data.files import naming, parse_json, user_error_on_full_disk, whole_file, write_atomic
from minimind_data.options import options_in_file
from minimind_data.reporting import counted
from minimind_data.tokenizer.loading import Tokenizer, same_encoding
from minimind_data.tokenizer.places import SHIPPED
from minimind_train.model.config import ModelConfig, parameter_line
from minimind_train.model.lora import adapters_of
from minimind_train.progress import Say, say_on_stderr
from minimind_train.run_folder.options import CheckpointChoice
from minimind_train.run_folder.record import RESTORE, RUN_CONFIG_NAME, RunRecord, load_run_tokenizer
from minimind_train.weights.foreign import is_hf_folder
from minimind_train.weights.gguf_form import Q8_BLOCK, write_gguf
from minimind_train.weights.hf_config import to_hf
from minimind_train.weights.loading import TrainedModel, adapted_model, open_model, tokenizer_beside
from minimind_train.weights.lora_form import USUAL_RANK, lora_tensors
from minimind_train.weights.minimind_form import file_name, minimind_form
from minimind_train.weights.model_card import NAME as CARD_NAME
from minimind_train.weights.model_card import model_card
from minimind_train.weights.options import StartOptions, Target, WeightDtype
from minimind_train.weights.peft_form import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    adapter_config,
    adapter_tensors,
)

__all__ = ["export"]

_GROUPED_ALIGNMENT = 16
"""Bytes; rows of experts must be a multiple of it for the kernel that transformers usually multiplies them with."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DEFAULT_DTYPE: dict[Target, WeightDtype] = {
    "hf": "fp32",
    "minimind": "fp16",
    "minimind-lora": "fp16",
    "peft": "fp32",
    "gguf": "fp16",
}


def export(
    run: Path | str,
    out: Path | str,
    *,
    to: Target,
    checkpoint: CheckpointChoice = None,
    dtype: WeightDtype | None = None,
    changes: Mapping[str, Any] = MappingProxyType({}),
    tokenizer: Path | str | None = None,
    lora: Path | str | None = None,
    say: Say = say_on_stderr,
) -> Path:
    """Write a model in another program's form.

    Args:
        run: the folder of a run, a Hugging Face folder, or MiniMind's `.pth`.
        out: a folder that is new or empty; for MiniMind and llama.cpp any folder, or the `.pth` or `.gguf` itself.
        to: hf for a folder that transformers opens; minimind for a `.pth` that MiniMind's code opens; gguf for a file that llama.cpp
            opens; peft for a folder with only the adapters of a run, and minimind-lora for MiniMind's file of them.
        checkpoint: the step of one, or `best`; the newest whole one by default.
        dtype: of the weights; by default fp32, and fp16 for MiniMind, which stores them so, and for gguf. q8_0, of 8 bits and a
            scale for each 32 numbers, is for gguf alone.
        changes: options of the model: those that are to differ, such as those of its positions, or that a `.pth` does not tell.
        tokenizer: of weights that are no run's, where it is not beside them or MiniMind's own.
        lora: a file of MiniMind's adapters, which are merged into the weights.
        say: takes lines for the user.

    Returns:
        The file or folder that was written.

    Raises:
        UserError: the form cannot hold this model, or nothing can be written there.
    """
    run, out = Path(run), Path(out)
    dtype = dtype or _DEFAULT_DTYPE[to]
    if dtype == "q8_0" and to != "gguf":
        raise UserError(
            "`dtype` q8_0 is a form of gguf's alone",
            remedy="take fp16, or `to` gguf",
            option="dtype",
        )
    if to in {"peft", "minimind-lora"}:
        return _adapters(out, run, to=to, step=checkpoint, dtype=dtype, lora=lora, say=say)
    trained = open_model(run, step=checkpoint, say=say, changes=changes, tokenizer=tokenizer, lora=lora)
    model = trained.model
    if model.config.dropout:
        say(f"dropout {model.config.dropout} matters only in training and is not exported")
    if to == "gguf":
        return _to_gguf(out, run, trained, dtype=dtype, say=say)
    weights = _cast(model.state_dict(), dtype, run)
    if to == "minimind":
        return _to_minimind(out, trained, weights, say)
    return _to_hf(out, run, trained, weights, lora=None if lora is None else Path(lora), say=say)


def _cast(tensors: Mapping[str, Tensor], dtype: WeightDtype, run: Path) -> dict[str, Tensor]:
    weights = {name: tensor.detach().to(_DTYPES[dtype]).contiguous() for name, tensor in tensors.items()}
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{name} holds numbers that {dtype} cannot",
                where=run,
                remedy="export it with `dtype` fp32, or take an earlier `checkpoint`",
                option="dtype",
            )
    return weights


def _to_minimind(out: Path, trained: TrainedModel, weights: dict[str, Tensor], say: Say) -> Path:
    config = trained.model.config
    form = minimind_form(config)
    name = trained.name if trained.record is None else trained.record.command
    path = out if out.suffix == ".pth" else out / file_name(name, config)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    _save_pth(
        path,
        weights,
        tokenizer=trained.tokenizer,
        tokenizer_folder=trained.tokenizer_folder,
        config=config,
        say=say,
    )
    say(f"{path}: {parameter_line(config)}, for the code of {form.generation}: {form.call}")
    return path


def _save_pth(
    path: Path,
    tensors: dict[str, Tensor],
    *,
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    config: ModelConfig,
    say: Say,
) -> None:
    """Write tensors for MiniMind's code and, where it is not that of their generation, their tokenizer beside them."""
    form = minimind_form(config)
    # MiniMind gives the weights that its own training makes the same names, so nothing tells whose they are.
    refuse_replacing(path, "out", is_ours=lambda _: False)
    folder = tokenizer_beside(path)
    theirs = _shipped_name(tokenizer) == form.tokenizer
    files = {} if theirs else _tokenizer_files(tokenizer_folder, tokenizer, config)
    for name, content in files.items():
        refuse_replacing(folder / name, "out", is_ours=has_content(content))
    with _sentence_on_failure(path), user_error_on_full_disk(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            torch.save(tensors, file)
            for name, content in files.items():
                folder.mkdir(exist_ok=True)
                write_atomic(folder / name, content)
    if theirs:
        say(
            f"{path}: its tokenizer is {form.tokenizer}, MiniMind's own, which lies in MiniMind's folder model/"
        )
    else:
        say(
            f"{folder}: {_in_words(tokenizer)}, which the weights need and MiniMind does not have; its code looks for one in its "
            "folder model/, so copy both files there"
        )


def _shipped_name(tokenizer: Tokenizer) -> str | None:
    """Return the name under which a tokenizer ships with this package; None for any other."""
    for name, folder in SHIPPED.items():
        text = (folder / TOKENIZER_NAME).read_text(encoding="utf-8")
        if tokenizer.json == text or same_encoding(tokenizer.json, text):
            return name
    return None


def _in_words(tokenizer: Tokenizer) -> str:
    name = _shipped_name(tokenizer)
    return (
        f"the tokenizer {name}" if name else f"a tokenizer of its own, {tokenizer.info.vocab_size:,} entries"
    )


def _to_gguf(out: Path, run: Path, trained: TrainedModel, *, dtype: WeightDtype, say: Say) -> Path:
    config, tokenizer = trained.model.config, trained.tokenizer
    template = chat_template_of(trained.tokenizer_folder)
    (architecture,) = to_hf(config, tokenizer.info, "float32")["architectures"]
    weights = trained.model.state_dict()
    if dtype == "fp16":
        _cast(weights, dtype, run)  # refuses what it cannot hold
    path = out if out.suffix == ".gguf" else out / f"{trained.name}-{dtype}.gguf"
    refuse_replacing(path, "out", is_ours=lambda _: False)
    with _sentence_on_failure(path), user_error_on_full_disk(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            wide = write_gguf(
                Path(file.name),
                weights,
                config=config,
                architecture=architecture,
                tokenizer_json=tokenizer.json,
                info=tokenizer.info,
                chat_template=template.text if template else None,
                name=trained.name,
                dtype=dtype,
            )
    if wide:
        say(
            f"{counted(len(wide), 'tensor')} in fp16: q8_0 needs rows that are a multiple of {Q8_BLOCK} numbers"
        )
    parts = f"with its tokenizer{' and chat template' if template else ''}"
    say(f"{path}: {parameter_line(config)} in {dtype}, {parts}; that is {_in_words(tokenizer)}")
    return path


def _to_hf(
    out: Path,
    run: Path,
    trained: TrainedModel,
    weights: dict[str, Tensor],
    *,
    lora: Path | None,
    say: Say,
) -> Path:
    tokenizer, config = trained.tokenizer, trained.model.config
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    hf_config = to_hf(config, tokenizer.info, dtype)
    (architecture,) = hf_config["architectures"]
    card = model_card(
        out.resolve().name,
        config=config,
        architecture=architecture,
        tokenizer=_in_words(tokenizer),
        run=run,
        record=trained.record,
        step=trained.step,
        lora=lora,
    )
    special = {name: hf_config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with _sentence_on_failure(out), new_folder(out) as folder:
        for name, content in {
            **_tokenizer_files(trained.tokenizer_folder, tokenizer, config),
            "config.json": _as_json(hf_config),
            "generation_config.json": _as_json(special),
            CARD_NAME: card.encode(errors="backslashreplace"),
        }.items():
            (folder / name).write_bytes(content)
        _save_weights(weights, folder / "model.safetensors", rights_of=folder / "config.json")
        _flush(folder)
    say(f"{out}: {parameter_line(config)} as {architecture} in {dtype}, with {_in_words(tokenizer)}")
    row_bytes = [
        size * next(iter(weights.values())).element_size()
        for size in (config.hidden_size, config.expert_size)
    ]
    if config.use_moe and any(num_bytes % _GROUPED_ALIGNMENT for num_bytes in row_bytes):
        say(
            f"transformers multiplies experts of this width (hidden_size {config.hidden_size}, moe_intermediate_size {config.expert_size}) "
            'only with from_pretrained(…, experts_implementation="eager")'
        )
    return out


def _adapters(
    out: Path,
    run: Path,
    *,
    to: Target,
    step: CheckpointChoice,
    dtype: WeightDtype,
    lora: Path | str | None,
    say: Say,
) -> Path:
    """Write the adapters of a run alone, for peft or for MiniMind."""
    if lora is not None or run.is_file() or is_hf_folder(run):
        raise UserError(
            f"`to` {to} writes the adapters of a run alone",
            where=run,
            remedy="pass by `run` a run with `lora_rank`, without `lora`; hf, minimind and gguf hold them merged",
            option="to",
        )
    record = RunRecord.read(run)
    base = options_in_file(StartOptions, record.options, run / RUN_CONFIG_NAME, remedy=RESTORE).from_weight
    model, lora_config = adapted_model(run, step=step, say=say)
    tokenizer = load_run_tokenizer(run, record.tokenizer)
    if to == "minimind-lora":
        tensors, rank = lora_tensors(model)
        ending = f"_{model.config.hidden_size}{'_moe' if model.config.use_moe else ''}.pth"
        name = run.resolve().name
        path = out if out.suffix == ".pth" else out / f"lora_{name.removeprefix('lora_')}{ending}"
        _save_pth(
            path,
            _cast(tensors, dtype, run),
            tokenizer=tokenizer,
            tokenizer_folder=run,
            config=model.config,
            say=say,
        )
        line = f"{path}: MiniMind's adapters of rank {rank}; they belong to {base}"
        if rank != USUAL_RANK:
            line += f", and its scripts open them only with apply_lora(model, rank={rank})"
        say(line)
        return path
    weights = _cast(adapter_tensors(model), dtype, run)
    with _sentence_on_failure(out), new_folder(out) as folder:
        for name, content in _tokenizer_files(run, tokenizer, model.config).items():
            (folder / name).write_bytes(content)
        (folder / ADAPTER_CONFIG_NAME).write_bytes(_as_json(adapter_config(lora_config, str(base))))
        _save_weights(weights, folder / ADAPTER_WEIGHTS_NAME, rights_of=folder / ADAPTER_CONFIG_NAME)
        _flush(folder)
    say(
        f"{out}: adapters of rank {lora_config.lora_rank} for {len(adapters_of(model))} matrices, with {_in_words(tokenizer)}; they belong "
        f"to {base}, which `mm-train export` with `to` hf makes a model that peft puts them on"
    )
    return out


def _as_json(content: dict[str, Any]) -> bytes:
    # A lone surrogate, as a hand-made tokenizer_config.json may hold one, is no UTF-8; its backslash escape is JSON's too.
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode(errors="backslashreplace")


def _tokenizer_files(folder: Path, tokenizer: Tokenizer, config: ModelConfig) -> dict[str, bytes]:
    """Return the content of tokenizer.json and tokenizer_config.json by name: special tokens and, where there is one, the chat template.

    Args:
        folder: with the tokenizer that the model has.
        tokenizer: the same, loaded.
        config: the model's shape.
    """
    path = folder / TOKENIZER_CONFIG_NAME
    tokenizer_config: dict[str, Any] = {}
    if path.is_file():
        try:
            tokenizer_config = dict(parse_json(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"no object in JSON ({error})", where=path, remedy="copy it from the dataset again"
            ) from None
    if (folder / TEMPLATE_NAME).is_file() and (template := chat_template_of(folder)) is not None:
        tokenizer_config["chat_template"] = template.text
    info = tokenizer.info
    tokens = {"bos_token": info.bos_id, "eos_token": info.eos_id, "pad_token": info.pad_id}
    tokenizer_config |= {
        name: None if number is None else tokenizer.reference.id_to_token(number)
        for name, number in tokens.items()
    }
    tokenizer_config |= {
        # Named, because transformers would else choose a class by the type of the model, with other rules.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.longest_sequence,
    }
    return {TOKENIZER_NAME: tokenizer.json.encode(), TOKENIZER_CONFIG_NAME: _as_json(tokenizer_config)}


def _save_weights(weights: dict[str, Tensor], path: Path, *, rights_of: Path) -> None:
    """Write tensors; the file gets the access rights of a usual one, as safetensors lets nobody else read what it writes."""
    save_file(weights, path, metadata={"format": "pt"})
    shutil.copymode(rights_of, path)


def _flush(folder: Path) -> None:
    """Flush every file of a folder to the disk."""
    for path in folder.iterdir():
        with naming(path), path.open("rb") as file:
            os.fsync(file.fileno())


@contextmanager
def _sentence_on_failure(out: Path) -> Iterator[None]:
    """Turn the errors by which torch and safetensors report a full disk into a sentence about `out`."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise UserError(
            f"could not be written ({str(error).partition(chr(10))[0]})",
            where=out,
            remedy="make room on the disk, or take another `out`",
            option="out",
        ) from None
