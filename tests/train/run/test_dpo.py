"""Direct preference optimization as a run: it begins at log 2, learns to prefer, and its reference never moves."""

import json
import math
import shutil

import numpy as np
import pytest

from minimind_data.errors import UserError
from minimind_data.options import options_from
from minimind_train.objectives.reference import REFERENCE_FOLDER_NAME
from minimind_train.run import entry
from minimind_train.run.evaluation import evaluate
from minimind_train.run.options import DpoOptions
from tests.helpers.datasets import chat_dataset
from tests.helpers.runs import Said, metrics, stop_after, weights

OPTIONS = {
    "seq_len": 48, "global_batch": 8, "micro_batch": 4, "steps": 6, "threads": 1, "save_every": 2, "keep": 0, "log_every": 1,
    "dtype": "fp32", "device": "cpu", "learning_rate": 1e-3,
}  # fmt: skip


@pytest.fixture
def begin(tmp_path, dpo_dataset, chat_base):
    def begin(name="run", **changes):
        said = Said()
        options = {**OPTIONS, "shards": (str(dpo_dataset),), "from_weight": str(chat_base)}
        config = options_from(DpoOptions, {**options, "run": tmp_path / name, **changes})
        entry.begin(config, said)
        return tmp_path / name, said

    return begin


def test_it_begins_at_log_two_and_learns_to_prefer(begin):
    run, _ = begin(steps=20, learning_rate=3e-3)
    first, last = metrics(run)[0], metrics(run)[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["reward_margin"] == pytest.approx(0, abs=1e-4)
    assert last["loss"] < 0.5
    assert last["reward_margin"] > 0.5
    assert last["reward_accuracy"] > 0.9
    assert last["reward_margin"] == pytest.approx(last["chosen_reward"] - last["rejected_reward"], abs=1e-4)
    gained = last["chosen_log_prob"] - last["rejected_log_prob"]
    assert gained > first["chosen_log_prob"] - first["rejected_log_prob"]


def test_cached_and_online_learn_the_same(begin):
    cached, _ = begin("cached")
    online, silent = begin("online", reference="online")
    assert "log-probabilities" not in silent.text
    for one, other in zip(metrics(cached), metrics(online), strict=True):
        for name in ("loss", "reward_margin", "chosen_log_prob", "rejected_reward"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=2e-4), name


def test_the_reference_is_computed_once_for_all_runs(begin, tmp_path):
    shards = chat_dataset(tmp_path / "pairs", "dpo", count=12)
    _, said = begin("one", shards=(str(shards),), steps=1)
    assert "computing the reference's log-probabilities of 12 pairs, once" in said.text
    found = sorted((shards / REFERENCE_FOLDER_NAME).iterdir())
    assert [path.suffix for path in found] == [".json", ".npy"]
    assert json.loads(found[0].read_bytes())["pairs"] == 12
    assert np.load(found[1]).shape == (12, 2)
    _, said = begin("two", shards=(str(shards),), steps=1, beta=0.3)
    assert "log-probabilities" not in said.text


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2, "lora_targets": "all"}, {"reference": "online"}])
def test_a_resume_is_exact(begin, changes):
    whole, _ = begin("whole", **changes)
    run, _ = begin(**changes)
    stop_after(run, 2)
    entry.resume(run, {}, say=Said())
    assert weights(run, 6) == weights(whole, 6)
    assert metrics(run) == metrics(whole)


def test_a_resume_needs_the_base_only_where_its_numbers_are_gone(begin, tmp_path, chat_base):
    shards = chat_dataset(tmp_path / "pairs", "dpo", count=12)
    base = shutil.copytree(chat_base, tmp_path / "base")
    run, _ = begin(shards=(str(shards),), from_weight=str(base))
    end = weights(run, 6)
    base.rename(tmp_path / "moved")
    stop_after(run, 4)
    entry.resume(run, {}, say=Said())
    assert weights(run, 6) == end
    stop_after(run, 4)
    shutil.rmtree(shards / REFERENCE_FOLDER_NAME)
    with pytest.raises(UserError, match=r"not beside the dataset, so it needs the weights .* gone"):
        entry.resume(run, {}, say=Said())
    entry.resume(run, {"from_weight": str(tmp_path / "moved")}, say=Said())
    assert weights(run, 6) == end


def test_adapters_are_compared_with_what_they_stand_beside(begin, chat_base):
    run, _ = begin(lora_rank=4, lora_targets="all", steps=15, learning_rate=3e-2)
    assert metrics(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert metrics(run)[-1]["reward_margin"] > 0.1


def test_it_is_measured_on_pairs_that_it_does_not_learn(begin, tmp_path):
    val = chat_dataset(tmp_path / "val", "dpo", count=10, seed=8)
    run, said = begin(val_shards=str(val), val_every=3)
    measured = [line for line in metrics(run) if "val_loss" in line]
    assert [line["step"] for line in measured] == [3, 6]
    assert "validation loss" in said.text
    found = evaluate(run, val, micro_batch=4)
    assert found.pairs == measured[-1]["val_pairs"] == 10
    assert found.loss == pytest.approx(measured[-1]["val_loss"], rel=1e-4)
    for name, value in found.metrics.items():
        assert value == pytest.approx(measured[-1][f"val_{name}"], rel=1e-3, abs=1e-4), name
    assert "reward margin" in str(found)
    assert "10 pairs" in str(found)


def test_a_mixture_of_pairs(begin, tmp_path, dpo_dataset):
    other = chat_dataset(tmp_path / "other", "dpo", count=11, seed=2)
    run, _ = begin(shards=(f"a={dpo_dataset}:1", f"b={other}:2"))
    online, _ = begin("online", shards=(f"a={dpo_dataset}:1", f"b={other}:2"), reference="online")
    assert metrics(run)[-1]["loss"] == pytest.approx(metrics(online)[-1]["loss"], rel=1e-3)


def test_other_layouts_are_none_for_pairs():
    with pytest.raises(ValueError, match="`layout` must be pad, a pair a window, not pack"):
        options_from(DpoOptions, {"layout": "pack"})


def test_a_run_in_which_no_pair_can_be_compared_does_not_begin(begin, tmp_path):
    with pytest.raises(UserError, match=r"in none of the \d+ windows of 6 tokens .*take a longer `seq_len`"):
        begin(seq_len=6)
    assert not (tmp_path / "run").exists()


def test_datasets_of_other_kinds_are_refused_by_name(begin, sft_dataset, chat_base):
    with pytest.raises(UserError, match="a dataset of kind sft, and `mm-train dpo` learns kind dpo"):
        begin(shards=(str(sft_dataset),))
    with pytest.raises(UserError, match="a dataset of kind pretrain, and the run learns kind dpo"):
        begin(val_shards=str(chat_base.parent / "data"))
