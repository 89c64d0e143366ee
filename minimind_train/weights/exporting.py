"""export(): the model of a run in a form that other programs open: a Hugging Face folder, a `.pth` of MiniMind's, a `.gguf`, or adapters.

`hf_config`, `minimind_form`, `gguf_form` and `peft_form` say what each form can hold; here it is written, whole or not at all. Adapters are merged
into their matrices, except for peft.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minimind_data.chat.template import chat_template_of
from minimind_data.dataset.format import TOKENIZER_CONFIG_NAME, TOKENIZER_NAME, TokenizerInfo
from minimind_data.dataset.occupancy import refuse_replacing
from minimind_data.dataset.staging import new_folder
from minimind_data.errors import UserError
from minimind_data.files import parse_json, user_error_on_full_disk, whole_file
from minimind_data.options import options_in_file
from minimind_data.reporting import counted
from minimind_data.tokenizer.loading import Tokenizer
from minimind_train.model.config import ModelConfig, parameter_line
from minimind_train.model.lora import adapters_of
from minimind_train.model.transformer import MiniMind
from minimind_train.progress import Say, say_on_stderr
from minimind_train.run_folder.options import CheckpointChoice
from minimind_train.run_folder.record import RESTORE, RUN_CONFIG_NAME, RunRecord, load_run_tokenizer
from minimind_train.weights.gguf_form import Q8_BLOCK, write_gguf
from minimind_train.weights.hf_config import to_hf
from minimind_train.weights.loading import adapted_model, model_of
from minimind_train.weights.minimind_form import file_name, minimind_form
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
_DEFAULT_DTYPE: dict[Target, WeightDtype] = {"hf": "fp32", "minimind": "fp16", "peft": "fp32", "gguf": "fp16"}


def export(
    run: Path | str,
    out: Path | str,
    *,
    to: Target,
    checkpoint: CheckpointChoice = None,
    dtype: WeightDtype | None = None,
    say: Say = say_on_stderr,
) -> Path:
    """Write the model of a run in another program's form.

    Args:
        run: its folder.
        out: a folder that is new or empty; for MiniMind and llama.cpp any folder, or the `.pth` or `.gguf` itself.
        to: hf for a folder that transformers opens; minimind for a `.pth` that MiniMind's code opens; gguf for a file that llama.cpp
            opens; peft for a folder with only the adapters.
        checkpoint: the step of one, or `best`; the newest whole one by default.
        dtype: of the weights; by default fp32, and fp16 for minimind, as MiniMind stores them, and for gguf. q8_0, of 8 bits and a
            scale for each 32 numbers, is for gguf alone.
        say: takes lines for the user.

    Returns:
        The file or folder that was written.

    Raises:
        UserError: the form cannot hold this model, or nothing can be written there.
    """
    run, out = Path(run), Path(out)
    record = RunRecord.read(run)
    dtype = dtype or _DEFAULT_DTYPE[to]
    if dtype == "q8_0" and to != "gguf":
        raise UserError(
            "`dtype` q8_0 is a form of gguf's alone",
            remedy="take fp16, or `to` gguf",
            option="dtype",
        )
    if to == "peft":
        base = options_in_file(
            StartOptions, record.options, run / RUN_CONFIG_NAME, remedy=RESTORE
        ).from_weight
        return _to_peft(out, run, step=checkpoint, base=base, dtype=dtype, say=say)
    model = model_of(run, step=checkpoint, say=say)
    if model.config.dropout:
        say(f"dropout {model.config.dropout} matters only in training and is not exported")
    if to == "gguf":
        return _to_gguf(out, run, record=record, model=model, dtype=dtype, say=say)
    weights = _cast(model.state_dict(), dtype, run)
    if to == "minimind":
        return _to_minimind(out, record, model, weights, say)
    return _to_hf(out, run, record=record, config=model.config, weights=weights, say=say)


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


def _to_minimind(out: Path, record: RunRecord, model: MiniMind, weights: dict[str, Tensor], say: Say) -> Path:
    form = minimind_form(model.config)
    path = out if out.suffix == ".pth" else out / file_name(record.command, model.config)
    # MiniMind gives the weights that its own training makes the same names, so nothing tells whose they are.
    refuse_replacing(path, "out", is_ours=lambda _: False)
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    with _sentence_on_failure(path), user_error_on_full_disk(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            torch.save(weights, file)
    say(f"{path}: {parameter_line(model.config)}, for the code of {form.generation}: {form.call}")
    return path


def _to_gguf(
    out: Path, run: Path, *, record: RunRecord, model: MiniMind, dtype: WeightDtype, say: Say
) -> Path:
    tokenizer = load_run_tokenizer(run, record.tokenizer)
    template = chat_template_of(run)
    (architecture,) = to_hf(model.config, record.tokenizer, "float32")["architectures"]
    weights = model.state_dict()
    if dtype == "fp16":
        _cast(weights, dtype, run)  # refuses what it cannot hold
    name = run.resolve().name
    path = out if out.suffix == ".gguf" else out / f"{name}-{dtype}.gguf"
    refuse_replacing(path, "out", is_ours=lambda _: False)
    with _sentence_on_failure(path), user_error_on_full_disk(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            wide = write_gguf(
                Path(file.name),
                weights,
                config=model.config,
                architecture=architecture,
                tokenizer_json=tokenizer.json,
                info=record.tokenizer,
                chat_template=template.text if template else None,
                name=name,
                dtype=dtype,
            )
    if wide:
        say(
            f"{counted(len(wide), 'tensor')} in fp16: q8_0 needs rows that are a multiple of {Q8_BLOCK} numbers"
        )
    say(
        f"{path}: {parameter_line(model.config)} in {dtype}, with its tokenizer{' and chat template' if template else ''}"
    )
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
    hf_config = to_hf(config, record.tokenizer, dtype)
    with _sentence_on_failure(out), new_folder(out) as folder:
        (folder / TOKENIZER_NAME).write_text(tokenizer.json, encoding="utf-8")
        special = {name: hf_config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        for name, content in (
            ("config.json", hf_config),
            ("generation_config.json", special),
            (TOKENIZER_CONFIG_NAME, _tokenizer_config(run, tokenizer, record.tokenizer, config)),
        ):
            _write_json(folder / name, content)
        _save_weights(weights, folder / "model.safetensors", rights_of=folder / "config.json")
        _flush(folder)
    say(f"{out}: {parameter_line(config)} as {hf_config['architectures'][0]} in {dtype}")
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


def _to_peft(
    out: Path, run: Path, *, step: CheckpointChoice, base: str | None, dtype: WeightDtype, say: Say
) -> Path:
    model, lora = adapted_model(run, step=step, say=say)
    weights = _cast(adapter_tensors(model), dtype, run)
    with _sentence_on_failure(out), new_folder(out) as folder:
        _write_json(folder / ADAPTER_CONFIG_NAME, adapter_config(lora, str(base)))
        _save_weights(weights, folder / ADAPTER_WEIGHTS_NAME, rights_of=folder / ADAPTER_CONFIG_NAME)
        _flush(folder)
    say(
        f"{out}: adapters of rank {lora.lora_rank} for {len(adapters_of(model))} matrices; they belong to {base}, which `mm-train "
        "export` with `to` hf makes a model that peft puts them on"
    )
    return out


def _write_json(path: Path, content: dict[str, Any]) -> None:
    # A lone surrogate, as a hand-made tokenizer_config.json may hold one, is no UTF-8; its backslash escape is JSON's too.
    text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _tokenizer_config(
    run: Path, tokenizer: Tokenizer, info: TokenizerInfo, config: ModelConfig
) -> dict[str, Any]:
    """Return the contents of tokenizer_config.json: the special tokens and, where the run has one, the chat template."""
    path = run / TOKENIZER_CONFIG_NAME
    tokenizer_config: dict[str, Any] = {}
    if path.is_file():
        try:
            tokenizer_config = dict(parse_json(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"no object in JSON ({error})", where=path, remedy="copy it from the dataset again"
            ) from None
    tokens = {"bos_token": info.bos_id, "eos_token": info.eos_id, "pad_token": info.pad_id}
    return {
        **tokenizer_config,
        **{
            name: None if number is None else tokenizer.reference.id_to_token(number)
            for name, number in tokens.items()
        },
        # Named, because transformers would else choose a class by the type of the model, with other rules.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.longest_sequence,
    }


def _save_weights(weights: dict[str, Tensor], path: Path, *, rights_of: Path) -> None:
    """Write tensors; the file gets the access rights of a usual one, as safetensors lets nobody else read what it writes."""
    save_file(weights, path, metadata={"format": "pt"})
    shutil.copymode(rights_of, path)


def _flush(folder: Path) -> None:
    """Flush every file of a folder to the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
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
