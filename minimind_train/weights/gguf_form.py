"""A model in one .gguf file, for llama.cpp and what is built on it (ollama, LM Studio); written by the package `gguf`.

Qwen3 and Qwen3-MoE keep their matrices as they are. The rotary embedding of a Llama pairs neighbouring dimensions of a head in llama.cpp,
and the first half of a head with the second here, so the rows of its queries and keys are put into llama.cpp's order. The tokenizer is
stored as tokens and merges, and its pre-tokenizer by name alone: a tokenizer that llama.cpp would apply differently is refused.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and llama.cpp's `convert_hf_to_gguf.py` and `src/llama-vocab.cpp`.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from minimind_data.dataset.format import TokenizerInfo
from minimind_data.errors import UserError
from minimind_train.model.config import ModelConfig
from minimind_train.weights.options import WeightDtype

Q8_BLOCK: Final = 32
"""Numbers of a row that share a scale in q8_0."""
_ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3moe"}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
_OF_EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

_NAME_OF_PRE_TOKENIZER = "gpt-2"
_REGEX_OF_GPT_2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
"""The one pre-tokenizer that cuts text as llama.cpp's `gpt-2` does."""
_MUST_BE = {
    "dropout": (None, 0.0),
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (False,),
    "ignore_merges": (False,),
}
"""Settings of the BPE model, and the values with which llama.cpp gives the same ids."""
_ADDED_MUST_BE_OFF = ("single_word", "lstrip", "rstrip")


def write_gguf(
    path: Path,
    weights: Mapping[str, Tensor],
    *,
    config: ModelConfig,
    architecture: str,
    tokenizer_json: str,
    info: TokenizerInfo,
    chat_template: str | None,
    name: str,
    dtype: WeightDtype,
) -> list[str]:
    """Write a model as a .gguf file.

    Args:
        path: of the file; it is written in place.
        weights: by our names, float32 on the CPU.
        config: the shape.
        architecture: Hugging Face's name of the class that computes what this model does.
        tokenizer_json: the text of the model's tokenizer.json.
        info: the ids of its special tokens.
        chat_template: in Jinja; None where there is none.
        name: of the model, for people.
        dtype: of the matrices: fp32, fp16, bf16, or q8_0. Norms and routers are always float32.

    Returns:
        The names of the matrices that q8_0 cannot hold, because their rows are no multiple of 32; they are fp16.

    Raises:
        UserError: llama.cpp would compute something else, or the package `gguf` is missing.
    """
    try:
        import gguf  # noqa: PLC0415 - an extra
    except ImportError:
        raise UserError(
            "`to` gguf needs the package gguf",
            remedy="pip install 'minimind-pipeline[gguf]'",
            option="to",
        ) from None
    _refuse_other_shape(config)
    vocabulary = _Vocabulary(tokenizer_json, config.vocab_size)
    kinds = gguf.GGMLQuantizationType
    kind = {"fp32": kinds.F32, "fp16": kinds.F16, "bf16": kinds.BF16, "q8_0": kinds.Q8_0}[dtype]
    writer = gguf.GGUFWriter(path, _ARCHITECTURES[architecture])
    try:
        file_type = {"fp32": "ALL_F32", "fp16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
        writer.add_file_type(gguf.LlamaFileType[file_type[dtype]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_name(name)
        _add_shape(writer, config.resolved())
        vocabulary.add_to(writer, gguf.TokenType, info)
        if chat_template is not None:
            writer.add_chat_template(chat_template)
        not_quantized = []
        for tensor_name, tensor in _tensors(weights, config):
            array, tensor_kind = tensor.float().numpy(), kind
            if tensor.ndim == 1 or "ffn_gate_inp" in tensor_name:
                tensor_kind = kinds.F32
            elif kind == kinds.Q8_0 and tensor.shape[-1] % Q8_BLOCK:
                tensor_kind = kinds.F16
                not_quantized.append(tensor_name)
            writer.add_tensor(tensor_name, gguf.quants.quantize(array, tensor_kind), raw_dtype=tensor_kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return not_quantized


def _refuse_other_shape(config: ModelConfig) -> None:
    """Refuse what the class of Hugging Face computes and llama.cpp does not."""
    obstacle = None
    if config.rope_scaling.inference_rope_scaling:
        obstacle = "stretches positions in its own way (inference_rope_scaling)"
    elif config.use_moe and not config.norm_topk_prob:
        obstacle = "always divides the weights of the chosen experts by their sum (norm_topk_prob off)"
    if obstacle is not None:
        raise UserError(
            f"`to` gguf: llama.cpp {obstacle}",
            remedy="export it by `to` hf, or without that option",
            option="to",
        )


def _add_shape(writer: Any, config: ModelConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.mlp_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(float(config.rope_theta))
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    if config.use_moe:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.expert_size)


def _tensors(weights: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield (llama.cpp's name, tensor); the matrices of a layer's experts are stacked, [experts, out, in]."""
    experts: dict[str, list[Tensor]] = {}
    for name, tensor in weights.items():
        parts = name.removesuffix(".weight").split(".")
        if name.removesuffix(".weight") in _OUTSIDE:
            yield f"{_OUTSIDE[name.removesuffix('.weight')]}.weight", tensor
            continue
        layer, inside = parts[2], ".".join(parts[3:])
        if parts[4:5] == ["experts"]:
            their_name = f"blk.{layer}.{_OF_EXPERTS[parts[6]]}.weight"
            experts.setdefault(their_name, []).append(tensor)
            if len(experts[their_name]) == config.num_experts:
                yield their_name, torch.stack(experts.pop(their_name))
            continue
        is_rotated = not config.qk_norm and inside in {"self_attn.q_proj", "self_attn.k_proj"}
        yield (
            f"blk.{layer}.{_IN_LAYER[inside]}.weight",
            _paired(tensor, config.head_size) if is_rotated else tensor,
        )
    assert not experts


def _paired(matrix: Tensor, head_size: int) -> Tensor:
    """Return the rows of a matrix of queries or keys with the two dimensions that are rotated together side by side."""
    halves = matrix.view(-1, 2, head_size // 2, matrix.shape[-1])
    return halves.transpose(1, 2).reshape(matrix.shape)


class _Vocabulary:
    """The tokens and merges of a tokenizer, for llama.cpp.

    Args:
        tokenizer_json: of a byte-level BPE.
        size: of the model's vocabulary; ids that are no tokens get names of their own.

    Raises:
        UserError: llama.cpp would turn some text into other ids.
    """

    def __init__(self, tokenizer_json: str, size: int) -> None:
        content = json.loads(tokenizer_json)
        if (obstacle := _obstacle(content)) is not None:
            raise UserError(
                f"`to` gguf: llama.cpp does not support this tokenizer: {obstacle}",
                remedy="export it by `to` hf, which takes every tokenizer",
                option="to",
            )
        self._tokens = {number: token for token, number in content["model"]["vocab"].items()}
        self._added = {token["id"]: token for token in content["added_tokens"]}
        self._merges = [
            merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]
        ]
        self._size = size

    def add_to(self, writer: Any, kinds: Any, info: TokenizerInfo) -> None:
        """Add them to a `GGUFWriter`; `kinds` is gguf's enumeration of kinds of tokens."""
        tokens, types = [], []
        for number in range(self._size):
            added = self._added.get(number)
            if added is not None:
                tokens.append(added["content"])
                types.append(kinds.CONTROL if added["special"] else kinds.USER_DEFINED)
            else:
                tokens.append(self._tokens.get(number, f"[unused{number}]"))
                types.append(kinds.NORMAL if number in self._tokens else kinds.UNUSED)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_NAME_OF_PRE_TOKENIZER)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(self._merges)
        if info.bos_id is not None:
            writer.add_bos_token_id(info.bos_id)
        writer.add_eos_token_id(info.eos_id)
        writer.add_pad_token_id(info.pad_id)
        writer.add_add_bos_token(False)
        writer.add_add_space_prefix(False)


def _obstacle(content: Mapping[str, Any]) -> str | None:
    """Return what a tokenizer.json has that llama.cpp does not support, or None."""
    model = content["model"]
    if model["type"] != "BPE":
        return f"a model of the type {model['type']}"
    for name, values in _MUST_BE.items():
        if model.get(name) not in values:
            return f"{name} {model[name]!r}"
    if content.get("normalizer") is not None:
        return f"its normalizer ({content['normalizer'].get('type')})"
    pre_tokenizer = content.get("pre_tokenizer") or {}
    if {name: pre_tokenizer.get(name) for name in _REGEX_OF_GPT_2} != _REGEX_OF_GPT_2:
        return f"its pre-tokenizer ({pre_tokenizer.get('type')}) is not that of GPT-2"
    for token in content["added_tokens"]:
        for name in _ADDED_MUST_BE_OFF:
            if token.get(name):
                return f"{name} of the token {token['content']!r}"
    return None
