"""What is exported computes the same in transformers' own classes, and comes back as it was."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from minimind_data.dataset.format import TokenizerInfo
from minimind_data.errors import UserError
from minimind_data.options import options_from
from minimind_train.model.config import ModelConfig, RopeScaling
from minimind_train.model.transformer import MiniMind
from minimind_train.run import entry
from minimind_train.weights.exporting import export
from minimind_train.weights.foreign import is_hf_folder, read_hf_folder, read_tensors
from minimind_train.weights.hf_config import from_hf, to_hf
from minimind_train.weights.loading import model_of
from minimind_train.weights.minimind_form import file_name, minimind_form
from tests.helpers.runs import Said, config_of, run_maker

BRISK = {"learning_rate": 0.05, "steps": 12, "save_every": 0}
EXPERTS = {"use_moe": True, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
YARN = {
    "inference_rope_scaling": True,
    "yarn_factor": 4.0,
    "yarn_original_max_position_embeddings": 64,
    "yarn_attention_factor": 1.2,
}
KINDS = {
    "qwen3": {},
    "qwen3-untied": {"tie_word_embeddings": False, "head_dim": 12},
    "qwen3-yarn": YARN,
    "llama": {"qk_norm": False, "rms_norm_eps": 1e-5, "rope_theta": 5000.0},
    "llama-yarn": {"qk_norm": False, "head_dim": 12, **YARN},
    "qwen3-moe": EXPERTS,
    "qwen3-moe-raw": {**EXPERTS, "norm_topk_prob": False, "tie_word_embeddings": False},
    "qwen3-moe-one": {**EXPERTS, "num_experts_per_tok": 1, **YARN},
}
CLASSES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM", "qwen3-moe": "Qwen3MoeForCausalLM"}
SPECIAL = TokenizerInfo(sha256="0" * 64, vocab_size=259, bos_id=1, eos_id=2, pad_id=0)


def ids_of(*shape):
    return torch.randint(0, 259, shape, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def make_run(tmp_path_factory, small_dataset):
    """A run of some brisk steps of a model with these options; the same options, the same run."""
    return run_maker(tmp_path_factory, small_dataset, **BRISK)


def ours(run, ids):
    with torch.no_grad():
        model = model_of(run, step=None, say=Said())
        return model.logits(model(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_opens_what_was_exported_and_computes_the_same(kind, make_run, tmp_path):
    run, out, said = make_run(**KINDS[kind]), tmp_path / "out", Said()
    export(run, out, to="hf", say=said)
    expected = CLASSES[
        kind.removesuffix("-untied").removesuffix("-yarn").removesuffix("-raw").removesuffix("-one")
    ]
    theirs, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(theirs).__name__ == expected
    assert not any(loading.values()), loading
    assert theirs.dtype == torch.float32
    assert f"as {expected} in float32" in said.text
    ids = ids_of(2, 90)
    with torch.no_grad():
        logits = theirs(ids).logits
    torch.testing.assert_close(ours(run, ids), logits, rtol=1e-4, atol=1e-4)
    assert logits.std() > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_exported_comes_back_as_it_was(kind, make_run, tmp_path):
    run = make_run(**KINDS[kind])
    export(run, tmp_path / "out", to="hf", say=Said())
    model = model_of(run, step=None, say=Said())
    config, weights = read_hf_folder(tmp_path / "out")
    aside = {"scoring_func", "seq_aux"} | (set() if config.use_moe else {"moe_intermediate_size"})
    for field in dataclasses.fields(config):
        if field.name not in aside:
            assert getattr(config, field.name) == getattr(model.config, field.name), field.name
    assert weights.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize("kind", ["qwen3", "llama-yarn", "qwen3-moe", "qwen3-moe-raw"])
def test_what_transformers_saves_is_read_sharded_or_not(kind, make_run, tmp_path):
    run = make_run(**KINDS[kind])
    export(run, tmp_path / "out", to="hf", say=Said())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    (tmp_path / "stacked").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "stacked" / "pytorch_model.bin")
    config_json = (tmp_path / "whole" / "config.json").read_bytes()
    (tmp_path / "stacked" / "config.json").write_bytes(config_json)
    ids = ids_of(1, 70)
    for name in ("whole", "sharded", "stacked"):
        config, weights = read_hf_folder(tmp_path / name)
        model = MiniMind(config).eval()
        model.load_state_dict(weights)
        with torch.no_grad():
            assert torch.equal(model.logits(model(ids)), ours(run, ids)), name


def test_whole_numbers_are_written_as_transformers_takes_them(tmp_path):
    options = {
        **EXPERTS,
        "rope_theta": 10000,
        "router_aux_loss_coef": 0,
        "inference_rope_scaling": True,
        "yarn_factor": 4,
    }
    (tmp_path / "config.json").write_text(
        json.dumps(to_hf(options_from(ModelConfig, options), SPECIAL, "float32"))
    )
    assert AutoConfig.from_pretrained(tmp_path).router_aux_loss_coef == 0


def test_experts_of_a_width_that_transformers_wants_told_are_told(make_run, tmp_path):
    said = Said()
    run = make_run(**{**KINDS["qwen3-moe"], "moe_intermediate_size": 18})
    export(run, tmp_path / "out", to="hf", say=said)
    assert 'experts_implementation="eager"' in str(said)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager").eval()
    ids = ids_of(1, 30)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(run, ids), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids)


def test_the_tokenizer_goes_along(make_run, tmp_path):
    run = make_run()
    export(run, tmp_path / "out", to="hf", say=Said())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "北京 is a city.<|im_end|>\n"
    expected = model_tokenizer(run).encode(text, add_special_tokens=False).ids
    assert tokenizer(text)["input_ids"] == expected
    assert tokenizer.decode(expected) == text
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert special == (1, 2, 0)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def model_tokenizer(run):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(run / "tokenizer.json"))


def test_a_chat_template_goes_from_the_dataset_through_the_run_into_the_folder(tmp_path, small_dataset):
    shards, run = shutil.copytree(small_dataset, tmp_path / "data"), tmp_path / "run"
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    told = json.dumps({"chat_template": template, "bos_token": "<|im_start|>"})
    (shards / "tokenizer_config.json").write_text(told)
    entry.begin(config_of(run, shards, steps=1), Said())
    assert (run / "tokenizer_config.json").read_text() == told
    export(run, tmp_path / "out", to="hf", say=Said())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|im_start|>a<|im_end|>"
    (run / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json: no object in JSON"):
        export(run, tmp_path / "other", to="hf", say=Said())


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_can_be_stored_short(make_run, tmp_path, dtype, torch_dtype):
    run = make_run()
    export(run, tmp_path / "out", to="hf", dtype=dtype, say=Said())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch_dtype
    _, weights = read_hf_folder(tmp_path / "out")
    for name, tensor in model_of(run, step=None, say=Said()).state_dict().items():
        assert torch.equal(weights[name], tensor.to(torch_dtype).float()), name


def test_an_earlier_checkpoint_can_be_exported(tmp_path, small_dataset):
    run = tmp_path / "run"
    entry.begin(config_of(run, small_dataset, **(BRISK | {"save_every": 1, "keep": 0})), Said())
    export(run, tmp_path / "first", to="hf", checkpoint=1, say=Said())
    _, weights = read_hf_folder(tmp_path / "first")
    name = "model.norm.weight"
    assert torch.equal(weights[name], model_of(run, step=1, say=Said()).state_dict()[name])
    assert not torch.equal(weights[name], model_of(run, step=12, say=Said()).state_dict()[name])


# MiniMind's form


@pytest.mark.parametrize(
    ("options", "name", "generation"),
    [
        ({}, "pretrain_16.pth", "minimind-3"),
        (EXPERTS, "pretrain_16_moe.pth", "minimind-3"),
        ({"qk_norm": False}, "pretrain_16.pth", "minimind2"),
        (
            {**EXPERTS, "qk_norm": False, "n_shared_experts": 1, "moe_intermediate_size": None},
            "pretrain_16_moe.pth",
            "minimind2",
        ),
    ],
    ids=["minimind-3", "minimind-3-moe", "minimind2", "minimind2-moe"],
)
def test_minimind_s_form_is_a_state_dict_in_half_precision(make_run, tmp_path, options, name, generation):
    run, said = make_run(**options), Said()
    path = export(run, tmp_path / "out", to="minimind", say=said)
    assert path == tmp_path / "out" / name
    assert f"for the code of {generation}: MiniMindConfig(hidden_size=16, num_hidden_layers=1" in said.text
    weights = torch.load(path, weights_only=True)
    model = model_of(run, step=None, say=Said())
    assert weights.keys() == {*model.state_dict(), "lm_head.weight"}
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    for key, tensor in model.state_dict().items():
        assert torch.equal(weights[key], tensor.half()), key
    with pytest.raises(UserError, match=f"{name}: a file of something else"):
        export(run, tmp_path / "out", to="minimind", say=Said())
    exact = export(run, tmp_path / "exact.pth", to="minimind", dtype="fp32", say=Said())
    assert exact == tmp_path / "exact.pth"
    for key, tensor in read_tensors(exact).items():
        assert key == "lm_head.weight" or torch.equal(tensor, model.state_dict()[key])


def test_minimind_s_names_of_files():
    assert file_name("sft", ModelConfig()) == "full_sft_768.pth"
    assert file_name("dpo", ModelConfig(hidden_size=640, use_moe=True)) == "dpo_640_moe.pth"


def test_minimind_s_options_are_those_of_its_generation():
    config = options_from(ModelConfig, {**EXPERTS, "qk_norm": False, "moe_intermediate_size": None})
    told = minimind_form(config).options
    assert told["n_routed_experts"] == 3
    assert told["aux_loss_alpha"] == config.router_aux_loss_coef
    assert not told.keys() & {"head_dim", "num_experts", "moe_intermediate_size"}
    newer = minimind_form(options_from(ModelConfig, EXPERTS)).options
    assert newer["num_experts"] == 3
    assert newer["moe_intermediate_size"] == 24
    assert newer["head_dim"] == 96


# What a form cannot hold


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            {**EXPERTS, "n_shared_experts": 1},
            "Qwen3MoeForCausalLM cannot hold shared experts (n_shared_experts 1)",
        ),
        ({**EXPERTS, "scoring_func": "sigmoid"}, "cannot hold a router other than softmax"),
        ({**EXPERTS, "qk_norm": False}, "cannot hold experts without a norm of queries and keys"),
        (
            {"qk_norm": False, "hidden_size": 100, "head_dim": 16},
            "hidden_size 100 with num_attention_heads 8",
        ),
    ],
)
def test_what_hugging_face_cannot_hold_is_refused_by_name(options, complaint):
    with pytest.raises(UserError) as error:
        to_hf(options_from(ModelConfig, options), SPECIAL, "float32")
    assert complaint in str(error.value)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({**EXPERTS, "n_shared_experts": 1}, "minimind-3, .* has no shared experts"),
        ({**EXPERTS, "scoring_func": "sigmoid"}, "scoring_func sigmoid"),
        ({**EXPERTS, "qk_norm": False}, "minimind2, .* moe_intermediate_size of its own"),
        (
            {"use_moe": True, "num_experts_per_tok": 1, "qk_norm": False},
            "norm_topk_prob with num_experts_per_tok 1",
        ),
        ({"qk_norm": False, "head_dim": 16}, "head_dim of its own"),
        ({"qk_norm": False, "tie_word_embeddings": False}, "tie_word_embeddings off"),
        (YARN, "other YaRN than its own .yarn_factor"),
        ({"inference_rope_scaling": True, "max_position_embeddings": 2048}, "YaRN for a model of max_pos"),
        (
            {"inference_rope_scaling": True, "head_dim": 4, "rope_theta": 1e4},
            "YaRN like this one for heads of 4",
        ),
    ],
)
def test_what_minimind_cannot_hold_is_refused_by_name(options, complaint):
    with pytest.raises(UserError, match=complaint):
        minimind_form(options_from(ModelConfig, options))


def test_an_export_leaves_nothing_half_done(make_run, tmp_path, monkeypatch):
    run = make_run()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="full: not empty"):
        export(run, tmp_path / "full", to="hf", say=Said())

    def fail(*_, **__):
        raise RuntimeError("PytorchStreamWriter failed writing file\nmore")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(
        UserError, match="could not be written .PytorchStreamWriter failed writing file.; make room"
    ):
        export(run, tmp_path / "out", to="minimind", say=Said())
    monkeypatch.setattr("minimind_train.weights.exporting.save_file", fail)
    with pytest.raises(UserError, match="could not be written"):
        export(run, tmp_path / "hf", to="hf", say=Said())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "out"]
    assert not list((tmp_path / "out").iterdir())


def test_what_a_killed_export_left_is_removed_by_the_next(make_run, tmp_path):
    (tmp_path / "hf.mm-data.partial").mkdir()
    (tmp_path / "hf.mm-data.partial" / "model.safetensors").write_bytes(b"half")
    export(make_run(), tmp_path / "hf", to="hf", say=Said())
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((".", "hf"))) == ["hf"]
    assert len({path.stat().st_mode for path in (tmp_path / "hf").iterdir()}) == 1


def test_numbers_that_a_dtype_cannot_hold_are_refused(make_run, tmp_path, monkeypatch):
    run = make_run()
    model = model_of(run, step=None, say=Said())
    with torch.no_grad():
        model.model.norm.weight[0] = 1e5
    monkeypatch.setattr("minimind_train.weights.loading._restore", lambda *_, **__: model)
    with pytest.raises(UserError, match="model.norm.weight holds numbers that fp16 cannot"):
        export(run, tmp_path / "out", to="minimind", say=Said())
    export(run, tmp_path / "out", to="minimind", dtype="fp32", say=Said())


# Reading what others wrote

TOLD = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 300,
    "max_position_embeddings": 128,
}


def test_what_a_config_leaves_out_is_transformers_default():
    config = from_hf(TOLD, "config.json")
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (4, 128, 1e4)
    assert not config.tie_word_embeddings
    assert from_hf({**TOLD, "model_type": "llama"}, "config.json").head_size == 16
    newer = {**TOLD, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}
    assert from_hf(newer, "config.json").rope_theta == 77


def test_yarn_without_a_factor_of_attention_has_the_paper_s():
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    scaling = from_hf({**TOLD, "rope_scaling": rope}, "config.json").rope_scaling
    assert scaling == RopeScaling(
        inference_rope_scaling=True,
        yarn_factor=4.0,
        yarn_original_max_position_embeddings=32,
        yarn_attention_factor=0.1 * math.log(4) + 1,
    )


def test_minimind_s_own_folders_are_read():
    older = {**TOLD, "model_type": "minimind", "use_moe": True, "n_routed_experts": 4, "n_shared_experts": 1}
    config = from_hf({**older, "aux_loss_alpha": 0.02, "num_experts_per_tok": 2}, "config.json")
    assert (config.qk_norm, config.tie_word_embeddings) == (False, True)
    assert (config.num_experts, config.n_shared_experts, config.router_aux_loss_coef) == (4, 1, 0.02)
    newer = from_hf({**TOLD, "model_type": "minimind", "head_dim": 16}, "config.json")
    assert newer.qk_norm


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "gpt2"}, "a model of the type 'gpt2'; the types that can be read are llama"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not something that this model computes"),
        ({"attention_bias": True}, "attention_bias true"),
        ({"use_sliding_window": True}, "use_sliding_window true"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"model_type": "qwen3_moe", "num_experts_per_tok": 2, "moe_intermediate_size": 8}, "of num_experts"),
        ({"hidden_size": None}, "says nothing of hidden_size"),
        ({"hidden_size": -1}, "`hidden_size` must be from 1"),
        ({"hidden_size": "wide"}, "config.json: "),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "stretched by 'linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "without truncate"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_this_model_does_not_compute_is_refused(change, complaint):
    with pytest.raises(UserError, match=complaint):
        from_hf({**TOLD, **change}, "config.json")


def test_files_that_are_no_weights_are_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"a": Code()}, tmp_path / "code.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name, complaint in (
        ("code.pth", "holds more than tensors"),
        ("list.pth", "is no state_dict"),
        ("text.pth", "text.pth: "),
        ("text.safetensors", "cannot be read"),
        ("none.pth", "no such file"),
    ):
        with pytest.raises(UserError, match=complaint):
            read_tensors(tmp_path / name)


def test_a_folder_without_weights_is_refused(tmp_path):
    assert not is_hf_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TOLD))
    assert is_hf_folder(tmp_path)
    with pytest.raises(UserError, match="holds no weights"):
        read_hf_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="does not say which file"):
        read_hf_folder(tmp_path)
