"""Supervised fine-tuning: the answers are learned and nothing else, with the guarantees of every run."""

import shutil
import tomllib

import numpy as np
import pytest

from minimind_data.dataset.format import IGNORED
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.options import flatten, leaves, options_from
from minimind_data.windows.opening import open_windows
from minimind_train.run import entry
from minimind_train.run.evaluation import evaluate
from minimind_train.run.options import DpoOptions, SftOptions
from minimind_train.run.toml import read_description
from minimind_train.run_folder.record import RunRecord
from tests.helpers.datasets import chat_dataset
from tests.helpers.runs import Said, metrics, stop_after, weights

OPTIONS = {
    "seq_len": 64, "global_batch": 8, "micro_batch": 4, "steps": 6, "threads": 1, "save_every": 2, "keep": 0, "log_every": 1,
    "dtype": "fp32", "device": "cpu", "dropout": 0.1, "learning_rate": 1e-3,
}  # fmt: skip


@pytest.fixture
def begin(tmp_path, sft_dataset, chat_base):
    def begin(name="run", **changes):
        said = Said()
        options = {**OPTIONS, "shards": (str(sft_dataset),), "from_weight": str(chat_base)}
        config = options_from(SftOptions, {**options, "run": tmp_path / name, **changes})
        entry.begin(config, said)
        return tmp_path / name, said

    return begin


def test_the_defaults_are_minimind_s():
    defaults = {name: default for name, _, default in leaves(SftOptions)}
    told = flatten(SftOptions())
    expected = {
        "layout": "pad", "seq_len": 768, "learning_rate": 1e-5, "global_batch": 16, "grad_clip": 1.0, "dtype": "auto",
        "from_weight": "runs/pretrain",
    }  # fmt: skip
    assert {name: defaults[name] for name in expected} == expected
    assert {name: told[name] for name in expected} == expected
    assert SftOptions.default_epochs == 2
    dpo = flatten(DpoOptions())
    expected |= {
        "seq_len": 1024, "learning_rate": 4e-8, "global_batch": 4, "beta": 0.15, "from_weight": "runs/sft",
    }  # fmt: skip
    assert {name: dpo[name] for name in expected} == expected
    assert DpoOptions.default_epochs == 1


@pytest.mark.parametrize("layout", ["pad", "pack"])
def test_what_is_learned_is_what_the_mask_marks(begin, sft_dataset, layout):
    run, _ = begin(layout=layout, steps=None, epochs=1)
    windows = open_windows(
        ShardSet.open(sft_dataset), layout=layout, seq_len=64, documents_apart=layout == "pack"
    )
    targets = windows.fetch(np.arange(len(windows)))["targets"]
    marked = sum(int(shard.mask.sum()) for shard in map(ShardSet.open(sft_dataset).shard, range(1)))
    assert sum(line["targets"] for line in metrics(run)) == (targets != IGNORED).sum() == marked
    options = RunRecord.read(run).options
    assert options["document_mask"] is (layout == "pack")
    assert RunRecord.read(run).command == "sft"


@pytest.mark.parametrize("layout", ["pad", "pack"])
def test_a_resume_is_exact_and_needs_no_base(begin, tmp_path, chat_base, layout):
    base = shutil.copytree(chat_base, tmp_path / "base")
    whole, _ = begin("whole", layout=layout)
    run, _ = begin(layout=layout, from_weight=str(base))
    shutil.rmtree(base)
    stop_after(run, 2)
    entry.resume(run, {}, say=Said())
    assert weights(run, 6) == weights(whole, 6)
    assert metrics(run) == metrics(whole)


def test_a_mixture_of_conversations(begin, tmp_path, sft_dataset):
    other = chat_dataset(tmp_path / "other", "sft", seed=3)
    run, said = begin(shards=(f"a={sft_dataset}:1", f"b={other}:1"))
    assert "mixture of 2" in said.text
    assert set(metrics(run)[-1]["epochs"]) == {"a", "b"}


def test_it_is_measured_on_conversations_and_on_text(begin, tmp_path, chat_base):
    val = chat_dataset(tmp_path / "val", "sft", count=9, seed=5)
    run, _ = begin(val_shards=str(val), val_every=3)
    measured = [line for line in metrics(run) if "val_loss" in line]
    assert [line["step"] for line in measured] == [3, 6]
    found = evaluate(run, val)
    assert found.loss == pytest.approx(measured[-1]["val_loss"])
    assert found.bits_per_byte is not None
    assert evaluate(run, chat_base.parent / "data").targets > 0


@pytest.mark.parametrize("kind", ["pretrain", "dpo"])
def test_datasets_of_other_kinds_are_refused_by_name(begin, tmp_path, chat_base, dpo_dataset, kind):
    shards = dpo_dataset if kind == "dpo" else chat_base.parent / "data"
    sentence = (
        rf"data: a dataset of kind {kind}, and `mm-train sft` learns kind sft; .*or train .*`mm-train {kind}`"
    )
    with pytest.raises(UserError, match=sentence):
        begin(shards=(str(shards),))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("layout", ["pad", "pack"])
def test_a_run_in_which_no_token_is_learned_does_not_begin(begin, tmp_path, layout):
    with pytest.raises(UserError, match=r"in none of the \d+ windows of 6 tokens .*take a longer `seq_len`"):
        begin(seq_len=6, layout=layout)
    assert not (tmp_path / "run").exists()


def test_a_validation_set_of_another_kind_is_refused(begin, tmp_path, chat_base):
    with pytest.raises(UserError, match="kind pretrain, and the run learns kind sft; take one of kind sft"):
        begin(val_shards=str(chat_base.parent / "data"))
    assert not (tmp_path / "run").exists()


def test_pairs_are_not_measured_like_text(begin, tmp_path, dpo_dataset):
    with pytest.raises(UserError, match="a dataset of kind dpo, and the run learns kind sft"):
        begin(val_shards=str(dpo_dataset))
    run, _ = begin(steps=1)
    with pytest.raises(UserError, match=r"a dataset of pairs, and .*run is a run of sft"):
        evaluate(run, dpo_dataset)


def test_the_stream_of_all_conversations_is_no_layout():
    with pytest.raises(ValueError, match="layout concat cuts conversations apart"):
        options_from(SftOptions, {"layout": "concat"})


def test_adapters_learn_to_answer_too(begin, chat_base):
    run, _ = begin(lora_rank=2, lora_targets="all", steps=4)
    again, _ = begin("again", lora_rank=2, lora_targets="all", steps=4)
    stop_after(again, 2)
    entry.resume(again, {}, say=Said())
    assert weights(again, 4) == weights(run, 4)


def test_a_run_may_begin_from_nothing_and_is_repeated_so(begin, tmp_path, sft_dataset):
    run, _ = begin(from_weight="none", hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    record = RunRecord.read(run)
    assert record.options["from_weight"] is None
    description = tomllib.loads((run / "run.toml").read_text("utf-8"))
    assert description["from_weight"] == "none"
    described = read_description(run / "run.toml", "sft", [name for name, _, _ in leaves(SftOptions)])
    again = options_from(SftOptions, {**described, "run": tmp_path / "again"})
    entry.begin(again, Said())
    assert weights(tmp_path / "again", 6) == weights(run, 6)
    stop_after(run, 2)
    entry.resume(run, {"from_weight": "none"}, say=Said())
    assert weights(tmp_path / "again", 6) == weights(run, 6)
