"""A run that begins from what another program's form holds goes on from the very same weights."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from minimind_data.errors import UserError
from minimind_data.tokenizer.loading import same_encoding
from minimind_train.generation.completion import complete
from minimind_train.generation.options import GenerateOptions
from minimind_train.model.config import ModelConfig
from minimind_train.model.transformer import MiniMind
from minimind_train.run import entry
from minimind_train.run.entry import resume
from minimind_train.run.evaluation import evaluate
from minimind_train.run.options import PretrainOptions
from minimind_train.run_folder import checkpoint
from minimind_train.run_folder.record import RunRecord
from minimind_train.run_folder.tensors import MODEL_NAME
from minimind_train.weights.exporting import export
from minimind_train.weights.loading import load_weights, model_of
from tests.helpers.datasets import retokenized
from tests.helpers.runs import Said, config_of, metrics, run_maker, stop_after, weights

SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
EXPERTS = {"use_moe": True, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
STRETCHED = {
    "inference_rope_scaling": True,
    "yarn_factor": 4.0,
    "yarn_original_max_position_embeddings": 64,
}
KINDS = {
    "qwen3": {},
    "qwen3-yarn": {**STRETCHED, "tie_word_embeddings": False},
    "llama": {"qk_norm": False, "rope_theta": 5000.0, "max_position_embeddings": 256},
    "qwen3-moe": {**EXPERTS, "norm_topk_prob": False},
}
STILL = {"steps": 1, "learning_rate": 1e-12, "weight_decay": 0.0}


@pytest.fixture(scope="module")
def make_run(tmp_path_factory, small_dataset):
    return run_maker(tmp_path_factory, small_dataset, steps=3, learning_rate=0.01)


@pytest.fixture
def begin_from(tmp_path, small_dataset):
    """Begin a run in tmp_path/begun from weights, with nothing said of the model but `options`."""

    def begin(origin, *, shards=small_dataset, **options):
        usual = {name: getattr(PretrainOptions().model, name) for name in SHAPE}
        config = config_of(tmp_path / "begun", shards, **{**usual, "from_weight": str(origin), **options})
        said = Said()
        entry.begin(config, said)
        return tmp_path / "begun", said

    return begin


def assert_same(run, other):
    one, two = (model_of(path, step=None, say=Said()) for path in (run, other))
    assert one.state_dict().keys() == two.state_dict().keys()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, two.state_dict()[name], rtol=0, atol=1e-9)
    ids = torch.arange(1, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(one.logits(one(ids)), two.logits(two(ids)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hugging_face_folder_gives_back_the_run(kind, make_run, begin_from, tmp_path):
    run = make_run(**KINDS[kind])
    export(run, tmp_path / "hf", to="hf", say=Said())
    found, there = load_weights(tmp_path / "hf"), load_weights(run)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in there.tensors.items())
    assert (found.tokenizer, found.step) == (there.tokenizer, None)
    model, known = MiniMind(found.config).eval(), model_of(run, step=None, say=Said())
    model.load_state_dict(found.tensors)
    ids = torch.arange(1, 90)[None]
    with torch.no_grad():
        assert torch.equal(model.logits(model(ids)), known.logits(known(ids)))
    begun, _ = begin_from(tmp_path / "hf", **STILL)
    assert_same(begun, run)
    options, then = RunRecord.read(begun).options, RunRecord.read(run).options
    for name in ("hidden_size", "head_dim", "qk_norm", "use_moe", "rope_theta", *STRETCHED):
        assert options[name] == then[name], name
    assert options["from_weight"] == str((tmp_path / "hf").resolve())


@pytest.mark.parametrize(
    "options",
    [
        {},
        EXPERTS,
        {"qk_norm": False},
        {**EXPERTS, "qk_norm": False, "n_shared_experts": 1, "moe_intermediate_size": 64},
    ],
    ids=["minimind-3", "minimind-3-moe", "minimind2", "minimind2-moe"],
)
def test_minimind_s_file_gives_back_the_run(options, make_run, begin_from, tmp_path):
    run = make_run(**options)
    path = export(run, tmp_path / "out", to="minimind", dtype="fp32", say=Said())
    with pytest.raises(UserError, match=r"belong to another model: .* is .* there and .* pass the options"):
        begin_from(path, **options)
    assert not (tmp_path / "begun").exists()
    begun, said = begin_from(path, **SHAPE, **options, **STILL)
    assert_same(begun, run)
    assert "tokenizer" not in said.text  # it lies beside the file
    shutil.rmtree(path.with_name(f"{path.stem}_tokenizer"))
    shutil.rmtree(begun)
    begun, said = begin_from(path, **SHAPE, **options, **STILL)
    assert_same(begun, run)
    assert f"{path}: says nothing of its tokenizer; it must be that of" in said.text


def test_half_precision_and_minimind_s_resume_file_are_read(make_run, tmp_path):
    run = make_run()
    path = export(run, tmp_path / "half.pth", to="minimind", say=Said())
    torch.save({"model": torch.load(path, weights_only=True), "epoch": 1}, tmp_path / "resume.pth")
    shape = dataclasses.replace(load_weights(run).config, vocab_size=6400)
    for file in (path, tmp_path / "resume.pth"):
        found = load_weights(file, shape=shape)
        assert found.config.vocab_size == 259
        assert found.tokenizer == (load_weights(run).tokenizer if file == path else None)
        for name, tensor in load_weights(run).tensors.items():
            assert torch.equal(found.tensors[name], tensor.half().float()), name


def test_untied_weights_need_an_untied_model(make_run, begin_from, tmp_path):
    run = make_run(tie_word_embeddings=False)
    path = export(run, tmp_path / "out", to="minimind", dtype="fp32", say=Said())
    with pytest.raises(
        UserError, match="its output matrix is not its embedding matrix; pass `tie_word_embeddings=False`"
    ):
        begin_from(path, **SHAPE)
    begun, _ = begin_from(path, **SHAPE, **STILL, tie_word_embeddings=False)
    assert_same(begun, run)


def test_before_its_first_checkpoint_a_run_reads_the_file_again(make_run, begin_from, tmp_path):
    path = export(make_run(), tmp_path / "out", to="minimind", say=Said())
    begun, _ = begin_from(path, **SHAPE, steps=4, keep=0)
    end, told = weights(begun, 4), metrics(begun)
    stop_after(begun, 0)
    resume(begun, {}, say=Said())
    assert (weights(begun, 4), metrics(begun)) == (end, told)
    stop_after(begun, 0)
    torch.save({name: tensor + 1 for name, tensor in torch.load(path).items()}, path)
    with pytest.raises(UserError, match="holds others"):
        resume(begun, {}, say=Said())


def test_room_for_more_entries_than_the_tokenizer_has_stays(make_run, begin_from, tmp_path, small_dataset):
    export(make_run(), tmp_path / "hf", to="hf", say=Said())
    file, told = tmp_path / "hf" / "model.safetensors", json.loads((tmp_path / "hf/config.json").read_text())
    tensors = load_file(file)
    name = "model.embed_tokens.weight"
    wider = {**tensors, name: torch.cat((tensors[name], torch.ones(13, 16)))}
    torch.save(wider, tmp_path / "hf" / "pytorch_model.bin")
    file.unlink()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**told, "vocab_size": 272}))
    begun, _ = begin_from(tmp_path / "hf", **STILL)
    stored = load_file(checkpoint.folder_of(begun, 1) / MODEL_NAME)
    torch.testing.assert_close(stored[name], wider[name], rtol=0, atol=1e-9)
    narrower = {**tensors, name: tensors[name][:200]}
    torch.save(narrower, tmp_path / "hf" / "pytorch_model.bin")
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**told, "vocab_size": 200}))
    shutil.rmtree(begun)
    with pytest.raises(UserError, match="a vocabulary of 259 entries does not fit a model of 200"):
        begin_from(tmp_path / "hf", **STILL)


# Tokenizers


def test_the_same_tokenizer_in_other_words_is_the_same(make_run, begin_from, tmp_path):
    export(make_run(), tmp_path / "hf", to="hf", say=Said())
    other = retokenized(tmp_path / "other")
    begun, _ = begin_from(tmp_path / "hf", shards=other, **STILL)
    assert_same(begun, make_run())
    shutil.rmtree(begun)
    (tmp_path / "hf" / "tokenizer_config.json").unlink()  # then nobody says which token is BOS
    begin_from(tmp_path / "hf", shards=other, **STILL)


def test_another_tokenizer_is_refused(make_run, begin_from, tmp_path):
    export(make_run(), tmp_path / "hf", to="hf", say=Said())
    path = tmp_path / "hf" / "tokenizer.json"
    told = json.loads(path.read_text())
    vocabulary = told["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"hf \(259 entries, .* have different tokenizers"):
        begin_from(tmp_path / "hf")
    path.write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json"):
        begin_from(tmp_path / "hf")
    assert not (tmp_path / "begun").exists()


def test_what_surrounds_a_text_decides_no_id(small_dataset):
    text = (small_dataset / "tokenizer.json").read_text()
    tokenizer = Tokenizer.from_str(text)
    tokenizer.enable_padding(pad_id=0, pad_token="<|endoftext|>")
    tokenizer.enable_truncation(7)
    assert tokenizer.to_str() != text
    assert same_encoding(tokenizer.to_str(), text)
    tokenizer.add_tokens(["<more>"])
    assert not same_encoding(tokenizer.to_str(), text)


# Used without training


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_measured_and_asked_as_its_run_is(kind, make_run, tmp_path, small_dataset):
    run, folder = make_run(**KINDS[kind]), tmp_path / "hf"
    export(run, folder, to="hf", say=Said())
    options = GenerateOptions(max_new_tokens=12, temperature=0.9)
    texts = ["".join(complete(path, "北京", options, device="cpu", say=Said())) for path in (run, folder)]
    assert texts[0] == texts[1]
    there = evaluate(run, small_dataset, device="cpu", say=Said())
    other = retokenized(tmp_path / "other")
    for dataset in (small_dataset, other):
        here = evaluate(folder, dataset, device="cpu", dtype="fp32", seq_len=16, say=Said())
        assert here.loss == pytest.approx(there.loss, rel=1e-6)
    with pytest.raises(UserError, match="have different tokenizers"):
        evaluate(run, other, device="cpu", say=Said())
    with pytest.raises(UserError, match="leave `checkpoint` out"):
        evaluate(folder, small_dataset, checkpoint=3, device="cpu", say=Said())


def test_windows_may_be_cut_otherwise_than_in_the_run(make_run, tmp_path, small_dataset):
    run, shards = make_run(), shutil.copytree(small_dataset, tmp_path / "data")
    entry.begin(config_of(tmp_path / "packed", shards, steps=1, layout="pack", seq_len=40), Said())
    for cut in ({"seq_len": 8}, {"layout": "pad"}, {"layout": "pack", "seq_len": 40}):
        evaluate(run, shards, device="cpu", **cut, say=Said())
    streams = evaluate(tmp_path / "packed", shards, device="cpu", layout="concat", say=Said())
    kept_apart = evaluate(tmp_path / "packed", shards, device="cpu", say=Said())
    assert streams.targets > kept_apart.targets


def test_longer_windows_than_the_model_reads_need_stretched_positions(make_run, small_dataset):
    run = make_run(max_position_embeddings=32)
    cut = {"seq_len": 64}
    with pytest.raises(UserError, match="reads at most 32 tokens, .* 64; take .* `inference_rope_scaling`"):
        evaluate(run, small_dataset, device="cpu", **cut, say=Said())
    changes = {**STRETCHED, "yarn_original_max_position_embeddings": 32}
    assert evaluate(run, small_dataset, device="cpu", **cut, changes=changes, say=Said()).targets > 0


def test_a_folder_that_says_nothing_of_bos_cannot_be_asked(make_run, tmp_path):
    export(make_run(), tmp_path / "hf", to="hf", say=Said())
    (tmp_path / "hf" / "tokenizer_config.json").unlink()
    with pytest.raises(
        UserError, match=r"nothing says which token is BOS .* or into its tokenizer_config.json"
    ):
        complete(tmp_path / "hf", "a", GenerateOptions(), device="cpu", say=Said())


# What is no weights


def test_a_step_is_a_run_s(make_run, begin_from, tmp_path):
    export(make_run(), tmp_path / "hf", to="hf", say=Said())
    path = export(make_run(), tmp_path / "x.pth", to="minimind", say=Said())
    for origin in (tmp_path / "hf", path):
        with pytest.raises(UserError, match="is no run, so it has no checkpoint of a step"):
            begin_from(origin, from_step=1)


def test_a_file_needs_a_shape_and_names_that_are_known(tmp_path):
    torch.save({"tok_embeddings.weight": torch.ones(4, 4)}, tmp_path / "older.pth")
    with pytest.raises(UserError, match="does not say of which model"):
        load_weights(tmp_path / "older.pth")
    with pytest.raises(UserError, match="no model of MiniMind's since minimind2"):
        load_weights(tmp_path / "older.pth", shape=ModelConfig())
