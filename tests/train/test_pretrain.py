"""A new run: what its folder holds, where it begins and ends, what cannot be run."""

import math
from pathlib import Path

import pytest

from minimind_data.errors import UserError
from minimind_data.shards import ShardSet
from minimind_data.windows import open_windows
from minimind_train import checkpoint
from minimind_train.runs import RunRecord

from .conftest import metrics, steps


def test_a_run_folder_has_all_that_the_run_is(whole_run, small_dataset):
    assert {path.name for path in whole_run.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "metrics.jsonl",
        "checkpoints",
    }
    record = RunRecord.read(whole_run)
    shards = ShardSet.open(small_dataset)
    assert record.command == "pretrain"
    assert record.dataset == shards.manifest.fingerprint
    assert record.tokenizer == shards.manifest.tokenizer
    assert record.changes == ()
    assert (whole_run / "tokenizer.json").read_bytes() == (small_dataset / "tokenizer.json").read_bytes()
    told = record.options
    assert told["vocab_size"] == shards.manifest.tokenizer.vocab_size
    assert (told["head_dim"], told["intermediate_size"]) == (8, 64)
    assert (told["epochs"], told["steps"], told["threads"]) == (None, 12, 1)
    assert told["shards"] == str(small_dataset.resolve())
    assert "run" not in told
    assert checkpoint.steps_of(whole_run) == [3, 6, 9, 12]
    assert checkpoint.load(whole_run, 9).state.cursor == 72
    assert steps(whole_run) == list(range(1, 13))


def test_without_words_a_run_is_two_epochs_and_no_sample_is_lost(begin, tmp_path, small_dataset):
    n = len(open_windows(ShardSet.open(small_dataset), layout="concat", seq_len=16))
    outcome, _ = begin(steps=None, global_batch=31, log_every=100)
    assert outcome.total_steps == outcome.step == math.ceil(2 * n / 31)
    assert outcome.cursor == 2 * n
    assert RunRecord.read(tmp_path / "run").options["epochs"] == 2


def test_layout_pad_trains_too(begin, tmp_path):
    outcome, _ = begin(layout="pad", epochs=1, steps=None)
    assert outcome.cursor == 64
    assert all(0 < record["targets"] < 8 * 16 for record in metrics(tmp_path / "run"))


def test_a_run_of_more_steps_than_the_dataset_has_goes_on_into_further_epochs(begin, tmp_path):
    outcome, _ = begin(steps=5, global_batch=100, micro_batch=200)
    assert outcome.cursor == 500
    assert metrics(tmp_path / "run")[-1]["epoch"] >= 3
    assert RunRecord.read(tmp_path / "run").options["micro_batch"] == 100


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"seq_len": 100_000, "max_position_embeddings": 200_000}, "shorter --seq-len"),
        ({"max_position_embeddings": 15}, "longer than the model's --max-position-embeddings 15"),
        ({"shards": Path("nowhere")}, "no dataset"),
        ({"device": "cuda:77"}, "--device cuda:77"),
        ({"device": "abacus"}, "--device abacus"),
        ({"resume_from": "text-00000:4"}, "needs --order sequential"),
        ({"order": "sequential", "resume_from": "text-00007:4"}, "text-00007"),
        ({"order": "sequential", "resume_from": "text-00000:4000000"}, "4000000"),
    ],
)
def test_what_cannot_be_run_leaves_no_folder(begin, tmp_path, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        begin(**changes)
    assert not (tmp_path / "run").exists()
