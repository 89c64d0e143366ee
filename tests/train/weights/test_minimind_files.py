"""MiniMind's bare files: what their tensors tell, the tokenizer that they need, its adapters, and its resume files."""

import dataclasses
import json
import shutil

import pytest
import torch
from torch import nn

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.chat.template import chat_template_of
from minimind_data.errors import UserError
from minimind_data.tokenizer.loading import load_tokenizer
from minimind_data.tokenizer.places import SHIPPED
from minimind_train import open_run
from minimind_train.generation.chat_session import ChatSession
from minimind_train.generation.completion import complete
from minimind_train.generation.options import GenerateOptions
from minimind_train.model.config import ModelConfig
from minimind_train.model.transformer import MiniMind, initialize
from minimind_train.run import entry
from minimind_train.run.evaluation import evaluate
from minimind_train.weights.exporting import export
from minimind_train.weights.loading import load_weights, open_model
from tests.helpers.commands import mm_train
from tests.helpers.runs import Said, config_of

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}
THREE = ModelConfig(**SIZE, intermediate_size=64)
TWO = ModelConfig(**SIZE, intermediate_size=64, qk_norm=False, rms_norm_eps=1e-5)
EXPERTS = {"use_moe": True, "num_experts": 3, "moe_intermediate_size": 64}
KINDS = {
    "minimind-3": THREE,
    "minimind-3-moe": dataclasses.replace(THREE, **EXPERTS),
    "minimind-3-untied": dataclasses.replace(THREE, tie_word_embeddings=False, num_attention_heads=4),
    "minimind2": TWO,
    "minimind2-moe": dataclasses.replace(TWO, **EXPERTS, num_experts_per_tok=2, n_shared_experts=1),
}
FEW = GenerateOptions(max_new_tokens=6, temperature=0.0)
IDS = torch.arange(5, 37).view(2, 16)


def model_like(config, seed=3):
    model = MiniMind(config).eval()
    initialize(model, seed)
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()  # what MiniMind's files can hold
    return model


def logits(model):
    with torch.no_grad():
        return model.logits(model(IDS))


def save(model, path):
    """Save a model as MiniMind does: halves, with the output matrix beside the embedding."""
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    torch.save(
        {**tensors, "lm_head.weight": tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])},
        path,
    )
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A dataset with the usual tokenizer, which is minimind-3's."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": "今天天气很好。" * n}) + "\n" for n in range(1, 40))
    )
    tokenize([folder / "text.jsonl"], TokenizeOptions(out=folder / "data"))
    return folder / "data"


@pytest.mark.parametrize("kind", KINDS)
def test_the_tensors_tell_the_shape(kind, tmp_path):
    model, said = model_like(KINDS[kind]), Said()
    trained = open_model(save(model, tmp_path / "it.pth"), step=None, say=said)
    assert dataclasses.replace(trained.model.config, moe_intermediate_size=None) == dataclasses.replace(
        KINDS[kind], head_dim=KINDS[kind].head_size, moe_intermediate_size=None
    )
    assert torch.equal(logits(trained.model), logits(model))
    generation = kind.partition("-")[0] if kind.startswith("minimind2") else "minimind-3"
    assert len(said) == 1
    assert (
        f"it.pth: {generation} by its tensors, hidden_size 32, num_hidden_layers 2, num_attention_heads"
        in said.text
    )
    assert ("num_attention_heads 8 (assumed)" in said.text) == (generation == "minimind2")
    assert ("num_experts_per_tok" in said.text) == kind.endswith("-moe")
    name = generation.replace("-", "")
    assert f"; tokenizer {name};" in said.text
    assert trained.tokenizer.json == (SHIPPED[name] / "tokenizer.json").read_text("utf-8")


def test_options_go_before_what_is_assumed_and_not_before_what_is_there(tmp_path):
    config = dataclasses.replace(TWO, num_attention_heads=4, num_key_value_heads=2, rope_theta=5000.0)
    model, path = model_like(config), tmp_path / "it.pth"
    save(model, path)
    with pytest.raises(UserError, match="num_attention_heads"):
        open_model(
            save(
                model_like(dataclasses.replace(TWO, hidden_size=36, num_attention_heads=6)),
                tmp_path / "six.pth",
            ),
            step=None,
            say=Said(),
        )
    opened = open_model(path, step=None, say=Said(), changes={"num_attention_heads": 4, "rope_theta": 5000.0})
    assert torch.equal(logits(opened.model), logits(model))
    for options in ({"hidden_size": 64}, {"num_hidden_layers": 3}, {"use_moe": True}, {"qk_norm": True}):
        with pytest.raises(UserError, match="another model"):
            open_model(path, step=None, say=Said(), changes=options)
    with pytest.raises(UserError, match="leave `checkpoint` out"):
        open_model(path, step=3, say=Said())


def test_a_vocabulary_that_is_no_tokenizer_s_needs_one(tmp_path, texts):
    path = save(model_like(dataclasses.replace(THREE, vocab_size=6401)), tmp_path / "it.pth")
    with pytest.raises(
        UserError, match=r"has 6,401 entries of a vocabulary, and the tokenizer minimind3 6,400; pass its own"
    ):
        open_model(path, step=None, say=Said())
    assert open_model(path, step=None, say=Said(), tokenizer="minimind2").tokenizer.info.vocab_size == 6400
    small = save(model_like(dataclasses.replace(THREE, vocab_size=300)), tmp_path / "small.pth")
    with pytest.raises(UserError, match="has 300 entries of a vocabulary, and the tokenizer 6,400"):
        open_model(small, step=None, say=Said(), tokenizer=texts)


def test_what_is_no_model_is_refused_in_a_sentence(tmp_path):
    tensors = model_like(THREE).state_dict()
    for damage, complaint in (
        (
            {"model.layers.0.self_attn.q_proj.weight": None},
            "no matrix model.layers.0.self_attn.q_proj.weight",
        ),
        (
            {"model.layers.0.mlp.gate_proj.weight": torch.ones(3)},
            "no matrix model.layers.0.mlp.gate_proj.weight",
        ),
        ({"model.embed_tokens.weight": None}, "has no model.embed_tokens.weight"),
        ({"model.layers.1.mlp.up_proj.weight": None}, "another model"),
        ({"model.layers.0.self_attn.q_norm.weight": torch.ones(3)}, "no model of MiniMind's|another model"),
        ({"model.layers.0.self_attn.q_norm.weight": torch.ones(())}, "no model of MiniMind's|another model"),
    ):
        damaged = {name: tensor for name, tensor in {**tensors, **damage}.items() if tensor is not None}
        torch.save(damaged, tmp_path / "it.pth")
        with pytest.raises(UserError, match=complaint):
            open_model(tmp_path / "it.pth", step=None, say=Said())
    with pytest.raises(UserError, match="`head_dim` must be from 1"):
        open_model(save(model_like(TWO), tmp_path / "it.pth"), step=None, say=Said(), changes={"head_dim": 0})
    (tmp_path / "empty.pth").touch()
    with pytest.raises(UserError, match="empty.pth: cannot be read .it is empty or cut off."):
        open_model(tmp_path / "empty.pth", step=None, say=Said())
    with pytest.raises(UserError, match="gone.pth: no such file"):
        open_model(tmp_path / "gone.pth", step=None, say=Said())


@pytest.mark.parametrize(
    "make",
    [
        lambda tensor: tensor.to_sparse(),
        lambda tensor: tensor.to(torch.complex64),
        lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        lambda tensor: torch.empty(tensor.shape, device="meta"),
        lambda tensor: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    ],
    ids=["sparse", "complex", "quantized", "meta", "nested"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_are_no_plain_matrices_are_refused(make, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = model_like(THREE).state_dict()
    torch.save({**tensors, name: make(tensors[name])}, tmp_path / "it.pth")
    with pytest.raises(UserError, match=f"{name} is no plain tensor of real numbers"):
        open_model(tmp_path / "it.pth", step=None, say=Said())
    with pytest.raises(UserError, match=f"{name} is no plain tensor of real numbers"):
        load_weights(tmp_path / "it.pth", shape=THREE)


def test_every_use_takes_such_a_file(tmp_path, texts):
    path = save(model_like(THREE), tmp_path / "full_sft_32.pth")
    answer = "".join(complete(path, "今天", FEW, device="cpu", say=Said()))
    opened = open_run(path, device="cpu", say=Said())
    assert "".join(opened.complete("今天", FEW)) == answer
    assert "file of weights" in repr(opened)
    said = list(opened.chat(FEW).answer("今天"))
    assert list(ChatSession.open(path, FEW, device="cpu", say=Said()).answer("今天")) == said
    loss = evaluate(path, texts, windows=2, seq_len=16, device="cpu", dtype="fp32", say=Said())
    export(path, tmp_path / "hf", to="hf", say=Said())
    again = evaluate(tmp_path / "hf", texts, windows=2, seq_len=16, device="cpu", dtype="fp32", say=Said())
    assert loss.as_dict() | {"dataset": 0} == again.as_dict() | {"dataset": 0}
    with pytest.raises(UserError, match="different tokenizers"):
        evaluate(path, texts, tokenizer="minimind2", windows=2, seq_len=16, say=Said())


def test_forms_lead_into_each_other(tmp_path):
    model, said = model_like(THREE), Said()
    path = save(model, tmp_path / "full_sft_32.pth")
    export(path, tmp_path / "hf", to="hf", say=said)
    back = export(tmp_path / "hf", tmp_path / "out", to="minimind", say=said)
    assert back.name == "hf_32.pth"
    assert torch.equal(logits(open_model(back, step=None, say=Said()).model), logits(model))
    assert not (tmp_path / "out" / "hf_32_tokenizer").exists()
    assert f"{back}: its tokenizer is minimind3, MiniMind's own" in said.text
    for origin in (path, tmp_path / "hf"):
        file = export(origin, tmp_path / "out", to="gguf", say=said)
        assert file.name == f"{origin.stem}-fp16.gguf"
    assert export(path, tmp_path / "more", to="minimind", dtype="fp32", say=said).name == "full_sft_32.pth"
    folder = export(tmp_path / "hf", tmp_path / "hf2", to="hf", say=said)
    assert chat_template_of(folder) == chat_template_of(tmp_path / "hf")
    for to in ("peft", "minimind-lora"):
        for origin in (path, tmp_path / "hf"):
            with pytest.raises(UserError, match="writes the adapters of a run alone"):
                export(origin, tmp_path / "no", to=to, say=Said())


def test_a_folder_says_its_shape_and_a_run_its_tokenizer(tmp_path, whole_run):
    export(save(model_like(THREE), tmp_path / "it.pth"), tmp_path / "hf", to="hf", say=Said())
    for folder in (tmp_path / "hf", whole_run):
        with pytest.raises(
            UserError, match="its hidden_size is .*, and `hidden_size` says 24; .*leave `hidden_size` out"
        ):
            open_model(folder, step=None, say=Said(), changes={"hidden_size": 24})
    with pytest.raises(UserError, match="is a run, which knows its tokenizer; leave `tokenizer` out"):
        open_model(whole_run, step=None, say=Said(), tokenizer="minimind2")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="or pass `tokenizer`"):
        open_model(tmp_path / "hf", step=None, say=Said())
    assert open_model(tmp_path / "hf", step=None, say=Said(), tokenizer="minimind3")


# The tokenizer that weights need


def test_another_tokenizer_lies_beside_the_file_and_is_found_there(tmp_path, texts):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "今天天气很好。" * 40}) + "\n")
    tokenize([path], TokenizeOptions(out=tmp_path / "data", tokenizer="default"))
    shape = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 2}
    entry.begin(config_of(tmp_path / "run", tmp_path / "data", steps=1, **shape), Said())
    said = Said()
    file = export(tmp_path / "run", tmp_path / "out", to="minimind", dtype="fp32", say=said)
    beside = tmp_path / "out" / "pretrain_32_tokenizer"
    assert sorted(path.name for path in beside.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert load_tokenizer(beside).info == load_tokenizer(tmp_path / "run").info
    assert f"{beside}: the tokenizer default, which the weights need and MiniMind does not have" in said.text
    assert "folder model/" in said.text
    opened = open_model(file, step=None, say=said)
    assert opened.tokenizer.json == (SHIPPED["default"] / "tokenizer.json").read_text("utf-8")
    assert f"; tokenizer {beside};" in said[-1]
    with pytest.raises(UserError, match="have different tokenizers"):
        entry.begin(config_of(tmp_path / "more", texts, from_weight=str(file), **shape), Said())
    file.unlink()
    export(tmp_path / "run", tmp_path / "out", to="minimind", say=Said())  # the same files may stay
    file.unlink()
    (beside / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="pretrain_32_tokenizer/tokenizer.json"):
        export(tmp_path / "run", tmp_path / "out", to="minimind", say=Said())
    assert not file.exists()


def test_the_card_says_what_the_run_knows_and_leaves_the_licence_open(tmp_path, whole_run, texts):
    export(whole_run, tmp_path / "hf", to="hf", say=Said())
    card = (tmp_path / "hf" / "README.md").read_text("utf-8")
    for words in (
        "| trained by | pre-training |",
        "| steps | ",
        "| loss | ",
        "entries",
        "**Licence: open.**",
        "fingerprint",
    ):
        assert words in card
    assert card.startswith("---\nlibrary_name: transformers\n")
    export(save(model_like(THREE), tmp_path / "it.pth"), tmp_path / "other", to="hf", say=Said())
    card = (tmp_path / "other" / "README.md").read_text("utf-8")
    assert "how they were trained is not known here" in card
    assert "the tokenizer minimind3" in card


# Adapters


class Beside(nn.Module):
    """A linear layer with one of MiniMind's adapters, computed beside it."""

    def __init__(self, linear, rank, generator):
        super().__init__()
        width = linear.weight.shape[0]
        self.linear = linear
        self.a = torch.randn(rank, width, generator=generator).half().float() / 8
        self.b = torch.randn(width, rank, generator=generator).half().float() / 8

    def forward(self, x):
        return self.linear(x) + x @ self.a.T @ self.b.T


def with_lora(model, rank=16):
    """Put adapters beside the square matrices of a model, in place; return MiniMind's file of them."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, module in list(model.named_modules()):
        for short, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child.weight.shape[0] == child.weight.shape[1]:
                beside = Beside(child, rank, generator)
                setattr(module, short, beside)
                tensors |= {
                    f"{name}.{short}.lora.A.weight": beside.a.half(),
                    f"{name}.{short}.lora.B.weight": beside.b.half(),
                }
    return tensors


@pytest.mark.parametrize("prefix", ["", "module."])
def test_minimind_s_adapters_are_merged(prefix, tmp_path):
    model = model_like(THREE)
    base, before = save(model, tmp_path / "full_sft_32.pth"), logits(model)
    tensors = with_lora(model)
    assert len(tensors) == 8
    expected = logits(model)
    assert (expected - before).abs().max() > 0.01
    lora = tmp_path / "lora_mine_32.pth"
    torch.save({prefix + name: tensor for name, tensor in tensors.items()}, lora)
    torch.testing.assert_close(
        logits(open_model(base, step=None, say=Said(), lora=lora).model), expected, rtol=1e-4, atol=1e-3
    )
    export(base, tmp_path / "hf", to="hf", lora=lora, say=Said())
    torch.testing.assert_close(
        logits(open_model(tmp_path / "hf", step=None, say=Said()).model), expected, rtol=1e-4, atol=1e-3
    )
    assert "| adapters | `lora_mine_32.pth`, merged |" in (tmp_path / "hf" / "README.md").read_text()
    one, other = (
        "".join(complete(base, "今天", FEW, lora=file, device="cpu", say=Said())) for file in (lora, None)
    )
    assert one != other
    # its resume file holds both
    resume_file = tmp_path / "lora_mine_32_resume.pth"
    state = {**torch.load(base, weights_only=True), **tensors}
    torch.save({"model": state, "optimizer": {}, "epoch": 0, "step": 7}, resume_file)
    torch.testing.assert_close(
        logits(open_model(resume_file, step=None, say=Said()).model), expected, rtol=1e-4, atol=1e-3
    )


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    model = model_like(THREE)
    base = save(model, tmp_path / "full_sft_32.pth")
    tensors = with_lora(model)
    lora = tmp_path / "lora.pth"
    torch.save(tensors, lora)
    with pytest.raises(
        UserError, match="holds adapters alone; pass the weights .* by `run` and this by `lora`"
    ):
        open_model(lora, step=None, say=Said())
    with pytest.raises(UserError, match="holds adapters alone"):
        load_weights(lora, shape=THREE)
    with pytest.raises(UserError, match="holds no adapters of MiniMind's"):
        open_model(base, step=None, say=Said(), lora=base)
    name = "model.layers.0.self_attn.q_proj.lora"
    for damage in (
        {f"{name}.A.weight": torch.ones(16, 31)},
        {f"{name}.B.weight": torch.ones(32, 15)},
        {f"{name}.B.weight": None},
        {f"{name}.A.weight": torch.ones(3)},
        {"model.layers.9.self_attn.q_proj.lora.A.weight": torch.ones(2, 32)},
    ):
        torch.save({key: value for key, value in {**tensors, **damage}.items() if value is not None}, lora)
        with pytest.raises(
            UserError, match="its adapter does not fit this model: model.layers.[09].self_attn.q_proj"
        ):
            open_model(base, step=None, say=Said(), lora=lora)


@pytest.mark.parametrize(("rank", "alpha"), [(4, None), (16, 8.0), (20, 40.0)])
def test_a_run_s_adapters_go_into_minimind_s_file(rank, alpha, tmp_path, texts):
    base = save(model_like(THREE), tmp_path / "full_sft_32.pth")
    options = {
        "lora_rank": rank,
        "lora_alpha": alpha,
        "lora_targets": "q_proj",
        "learning_rate": 0.1,
        "steps": 4,
    }
    run, said = tmp_path / "mine", Said()
    shape = {**SIZE, "intermediate_size": 64}
    entry.begin(config_of(run, texts, from_weight=str(base), **shape, **options), Said())
    file = export(run, tmp_path / "out", to="minimind-lora", dtype="fp32", say=said)
    assert file.name == "lora_mine_32.pth"
    tensors = torch.load(file, weights_only=True)
    squares = {f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in ("q", "o")}
    assert tensors.keys() == {f"{name}.lora.{side}.weight" for name in squares for side in "AB"}
    assert {min(tensor.shape) for tensor in tensors.values()} == {max(rank, 16)}
    assert (f"apply_lora(model, rank={rank})" in said.text) == (rank > 16)
    assert f"they belong to {base}" in said.text
    assert (
        torch.load(export(run, tmp_path / "half.pth", to="minimind-lora", say=Said()), weights_only=True)[
            "model.layers.0.self_attn.q_proj.lora.A.weight"
        ].dtype
        == torch.float16
    )
    merged = open_model(run, step=None, say=Said()).model
    beside = open_model(base, step=None, say=Said(), lora=file).model
    assert not torch.equal(logits(merged), logits(open_model(base, step=None, say=Said()).model))
    torch.testing.assert_close(logits(beside), logits(merged), rtol=1e-5, atol=1e-5)


def test_adapters_for_which_minimind_has_no_place_are_refused(tmp_path, texts):
    base = save(model_like(THREE), tmp_path / "full_sft_32.pth")
    shape = {**SIZE, "intermediate_size": 64}
    options = {"from_weight": str(base), "lora_rank": 2, "lora_targets": "v_proj", "steps": 1}
    entry.begin(config_of(tmp_path / "run", texts, **shape, **options), Said())
    with pytest.raises(
        UserError, match=r"v_proj is \[8, 32\], and MiniMind has adapters for square matrices alone"
    ):
        export(tmp_path / "run", tmp_path / "out", to="minimind-lora", say=Said())
    assert not (tmp_path / "out").exists()


# Resume files


def test_a_resume_file_says_what_is_not_taken_from_it(tmp_path, texts):
    base = save(model_like(THREE), tmp_path / "pretrain_32.pth")
    resume_file = tmp_path / "pretrain_32_resume.pth"
    content = {
        "model": torch.load(base, weights_only=True),
        "optimizer": {"state": {}},
        "epoch": 1,
        "step": 3,
    }
    shape = {**SIZE, "intermediate_size": 64, "from_weight": str(resume_file), "steps": 1, "seq_len": 8}
    for extra, words in (
        (
            {},
            "after step 3. Its weights are taken; its optimizer's moments, its learning rate and its step are not",
        ),
        ({"world_size": 2, "wandb_id": None}, "after step 3 of 2 processes. Its weights are taken"),
    ):
        torch.save({**content, **extra}, resume_file)
        said = Said()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        entry.begin(config_of(tmp_path / "run", texts, **shape), said)
        assert f"{resume_file}: MiniMind's run stood in its epoch 2 {words}" in said.text
        samples = 3 * 4 * extra.get("world_size", 1)
        assert (
            f"it had learned from {samples} samples of that epoch: `skip_positions` 0:{samples}" in said.text
        )
    said = Said()
    shutil.rmtree(tmp_path / "run")
    entry.begin(config_of(tmp_path / "run", texts, skip_positions=("0:24",), **shape), said)
    assert "MiniMind's run stood" in said.text
    assert "had learned from" not in said.text


# The command line


def test_the_commands_take_them(tmp_path, texts):
    config = dataclasses.replace(TWO, num_attention_heads=4)
    model = model_like(config)
    base = save(model, tmp_path / "full_sft_32.pth")
    torch.save(with_lora(model), tmp_path / "lora_mine_32.pth")
    shape = ["--num-attention-heads", "4", "--hidden_size", "32"]
    generate = ["generate", "--run", base, "--prompt", "今天", "--max-new-tokens", "3", "--device", "cpu"]
    result = mm_train(*generate, *shape)
    assert result.exit_code == 0, result.output
    assert "minimind2 by its tensors" in result.output
    assert "pass the model's options or --tokenizer" in result.output
    assert mm_train(*generate, *shape, "--lora", tmp_path / "lora_mine_32.pth").exit_code == 0
    result = mm_train(*generate, "--lora", tmp_path / "none.pth")
    assert (result.exit_code, "none.pth: no such file" in result.output) == (1, True)
    result = mm_train(*generate, "--hidden-size", "24")
    assert (result.exit_code, "belong to another model" in result.output) == (1, True)
    result = mm_train("eval", "--run", base, "--shards", texts, *shape, "--windows", "1", "--seq-len", "8")
    assert (result.exit_code, "different tokenizers" in result.output) == (1, True)
    words = ["export", "--run", base, *shape, "--tokenizer", "minimind3", "--out"]
    result = mm_train(*words, tmp_path / "hf", "--to", "hf")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_attention_heads"] == 4
    result = mm_train("eval", "--run", tmp_path / "hf", "--shards", texts, "--windows", "1", "--seq-len", "8")
    assert result.exit_code == 0, result.output
