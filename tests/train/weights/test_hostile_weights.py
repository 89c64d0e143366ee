"""Weights of others can be anything: they load, or one sentence says which file is wrong."""

import copy
import io
import json
import random

import pytest
import torch
from safetensors.torch import save_file

from minimind_data.errors import UserError
from minimind_train.model.config import ModelConfig
from minimind_train.weights.foreign import is_hf_folder, parameters_of_model, read_hf_folder, read_tensors
from minimind_train.weights.hf_config import from_hf
from tests.helpers.mutations import mutations

CONFIGS = {
    "llama": {
        "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 64, "vocab_size": 40, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "head_dim": 8,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32,
            "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": True,
        },
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 64, "vocab_size": 40, "max_position_embeddings": 64, "head_dim": 8, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True, "router_aux_loss_coef": 0.001,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "rope_scaling": None, "rope_theta": 1e6,
    },
    "minimind": {
        "model_type": "minimind", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 64, "vocab_size": 40, "max_position_embeddings": 64, "use_moe": True, "n_routed_experts": 4,
        "n_shared_experts": 1, "num_experts_per_tok": 1, "scoring_func": "softmax", "aux_loss_alpha": 0.1, "seq_aux": True,
        "dropout": 0.0,
    },
}  # fmt: skip


def refusal_of(read, *arguments):
    try:
        read(*arguments)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_value_of_a_config_is_taken_or_refused_in_one_sentence(kind):
    assert refusal_of(from_hf, CONFIGS[kind], "config.json") is None
    refused = 0
    for change, changed in mutations(copy.deepcopy(CONFIGS[kind])):
        sentence = refusal_of(from_hf, changed, "config.json")
        assert sentence is None or (sentence.startswith("config.json: ") and "\n" not in sentence), change
        refused += sentence is not None
    assert refused > 100


@pytest.mark.parametrize("text", ["[]", "3", "[" * 100_000, "\xff"])
def test_a_config_that_is_no_object_is_a_sentence(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert not is_hf_folder(tmp_path)
    with pytest.raises(UserError, match=r"config\.json: "):
        read_hf_folder(tmp_path)


@pytest.mark.parametrize("parts", [["../x"], ["/etc/passwd"], [3], [["a"]], [None]])
def test_an_index_of_weights_names_files_in_its_folder(tmp_path, parts):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    index = {"weight_map": dict(enumerate(parts))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="does not say which file holds which weight"):
        read_hf_folder(tmp_path)


@pytest.mark.parametrize("shape", [(), (4,), (4, 16), (4, 3, 16), (4, 16, 8, 2)])
@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_stacked_experts_of_odd_shapes_are_a_sentence(tmp_path, name, shape):
    tensors = {f"model.layers.0.mlp.experts.{name}": torch.zeros(shape)}
    config = ModelConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, use_moe=True
    )
    with pytest.raises(UserError, match="no stacked experts|belong to another model"):
        parameters_of_model(tensors, config.resolved(), tmp_path)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_file_of_torch_that_is_cut_off_anywhere_is_a_sentence(tmp_path, legacy):
    buffer = io.BytesIO()
    tensors = {"a.weight": torch.arange(12.0), "b.weight": torch.ones(3, 4)}
    torch.save(tensors, buffer, _use_new_zipfile_serialization=not legacy)
    content = buffer.getvalue()
    path = tmp_path / "weights.pth"
    for stop in range(0, len(content), max(1, len(content) // 150)):
        path.write_bytes(content[:stop])
        sentence = refusal_of(read_tensors, path)
        assert sentence is not None, stop
        assert sentence.startswith(f"{path}: "), stop
        assert "\n" not in sentence, stop


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_flipped_bytes_are_read_or_a_sentence(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    tensors = {"a.weight": torch.arange(12.0), "b.weight": torch.ones(3, 4)}
    if suffix == ".pth":
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    else:
        save_file(tensors, path)
    content = path.read_bytes()
    source = random.Random(0)
    for _ in range(200):
        changed = bytearray(content)
        changed[source.randrange(len(changed))] = source.randrange(256)
        path.write_bytes(changed)
        sentence = refusal_of(read_tensors, path)
        assert sentence is None or sentence.startswith(f"{path}: ")
