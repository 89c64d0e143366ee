"""Runs on a dataset without BOS, as of a tokenizer of Qwen's family: trained, resumed, continued, exported and opened again."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.dataset.format import Manifest
from minimind_data.errors import UserError
from minimind_train.generation.completion import complete
from minimind_train.generation.options import GenerateOptions
from minimind_train.integrations.minimind import PretrainDataset
from minimind_train.run import entry
from minimind_train.run.evaluation import evaluate
from minimind_train.run_folder.record import RunRecord
from minimind_train.weights.exporting import export
from tests.helpers.chats import CHATML
from tests.helpers.commands import mm_train
from tests.helpers.datasets import byte_tokenizer
from tests.helpers.runs import Said, assert_alike, config_of, stop_after, weights

TEXTS = [f"{number} times two is {2 * number}." + " Sure." * (number % 5) for number in range(80)]
GREEDY = GenerateOptions(max_new_tokens=9, temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer of single bytes whose config says that there is no BOS; read only."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in TEXTS))
    return path


@pytest.fixture(scope="module")
def dataset(folder, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("dataset") / "data"
    tokenize([text], TokenizeOptions(out=out, tokenizer=folder, workers=1))
    return out


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """A run of a few brisk steps in windows of whole documents; read only."""
    run = tmp_path_factory.mktemp("runs") / "run"
    options = {"layout": "pack", "document_mask": True, "learning_rate": 0.05, "seq_len": 48, "keep": 0}
    entry.begin(config_of(run, dataset, **options), Said())
    return run


def test_a_stopped_run_goes_on_to_the_same_weights(run, tmp_path):
    again = shutil.copytree(run, tmp_path / "run")
    assert RunRecord.read(again).tokenizer.bos_id is None
    stop_after(again, 6)
    entry.resume(again, say=Said())
    assert_alike(again, run, 12)
    assert weights(again, 12) == weights(run, 12)


@pytest.mark.parametrize("layout", ["concat", "pad"])
def test_other_layouts_learn_too(dataset, tmp_path, layout):
    options = {"layout": layout, "learning_rate": 0.05, "seq_len": 48}
    outcome = entry.begin(config_of(tmp_path / "run", dataset, **options), Said())
    assert outcome.step == 12
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_what_is_exported_continues_a_text_as_the_run_does(run, dataset, text, tmp_path):
    out = tmp_path / "out"
    export(run, out, to="hf", say=Said())
    for name in ("config.json", "generation_config.json"):
        content = json.loads((out / name).read_text())
        assert (content["bos_token_id"], content["eos_token_id"], content["pad_token_id"]) == (None, 2, 0)
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert theirs.config.bos_token_id is None
    assert tokenizer.bos_token is None
    prompt = tokenizer("7 times", return_tensors="pt")
    assert prompt["input_ids"].tolist() == [byte_tokenizer().encode("7 times").ids]
    continued = theirs.generate(**prompt, max_new_tokens=9, do_sample=False)[
        0, prompt["input_ids"].shape[1] :
    ]
    answer = tokenizer.decode(continued, skip_special_tokens=True)
    assert answer
    for model in (run, out):
        assert "".join(complete(model, "7 times", GREEDY, device="cpu", say=Said())) == answer
    ours, exported = (
        evaluate(model, dataset, layout="pack", seq_len=48, device="cpu", dtype="fp32", say=Said())
        for model in (run, out)
    )
    assert ours.loss == pytest.approx(exported.loss, rel=1e-6)
    # The exported folder tokenizes as the dataset was, so its tokenizer is taken for the same.
    tokenize([text], TokenizeOptions(out=tmp_path / "data", tokenizer=out, workers=1))
    assert Manifest.read(tmp_path / "data").tokenizer.bos_id is None


def test_a_run_can_begin_from_it(run, dataset, tmp_path):
    export(run, tmp_path / "out", to="hf", say=Said())
    outcome = entry.begin(
        config_of(tmp_path / "next", dataset, from_weight=tmp_path / "out", steps=2), Said()
    )
    assert outcome.step == 2


def test_nothing_begins_without_a_token(run, dataset, tmp_path):
    with pytest.raises(
        UserError, match="`prompt` has no token, and the tokenizer no BOS that .*; pass a text"
    ):
        "".join(complete(run, "", GREEDY, device="cpu", say=Said()))
    result = mm_train("generate", "--run", run, "--prompt", "")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: --prompt has no token, and the tokenizer no BOS")
    with pytest.raises(UserError, match="`sample_prompt` has no token, and the tokenizer no BOS that"):
        entry.begin(config_of(tmp_path / "run", dataset, sample_every=2), Said())
    assert not (tmp_path / "run").exists()
    said = Said()
    entry.begin(config_of(tmp_path / "run", dataset, sample_every=6, sample_prompt=("7 times",)), said)
    assert "step 12  after '7 times': " in said.text


@pytest.mark.parametrize("layout", ["pad", "pack"])
def test_documents_of_eos_alone_teach_nothing(folder, tmp_path, layout):
    """As of texts of which the tokenizer leaves no token."""
    shutil.copytree(folder, tmp_path / "tok")
    content = json.loads((tmp_path / "tok" / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    (tmp_path / "tok" / "tokenizer.json").write_text(json.dumps(content))
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": " " * length}) + "\n" for length in range(1, 40)))
    tokenize([source], TokenizeOptions(out=tmp_path / "data", tokenizer=tmp_path / "tok", workers=1))
    with pytest.raises(UserError, match="is a token learned: no document has a token besides its EOS; take"):
        entry.begin(config_of(tmp_path / "run", tmp_path / "data", layout=layout), Said())
    assert not (tmp_path / "run").exists()
    source.write_text(source.read_text() + json.dumps({"text": "a"}) + "\n")
    tokenize([source], TokenizeOptions(out=tmp_path / "data", workers=1))
    entry.begin(config_of(tmp_path / "run", tmp_path / "data", layout=layout, steps=1), Said())


def test_minimind_s_scripts_take_a_tokenizer_without_bos(folder, dataset, text):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.bos_token is None
    for source in (dataset, text):
        samples = PretrainDataset(source, tokenizer, max_length=12, say=Said())
        assert len(samples) == len(TEXTS)
        for number, one in enumerate(TEXTS):
            ids = [*tokenizer(one).input_ids[:11], 2]
            ids += [0] * (12 - len(ids))
            input_ids, labels = samples[number]
            assert input_ids.tolist() == ids
            assert labels.tolist() == [token or -100 for token in ids]
