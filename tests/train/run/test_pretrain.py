"""A new run: what its folder holds, where it begins and ends, what cannot be run."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from minimind_data.dataset.format import IGNORED
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.windows.opening import open_windows
from minimind_train.order.sample_order import SampleOrder
from minimind_train.parallel import devices
from minimind_train.run import entry
from minimind_train.run.entry import resume
from minimind_train.run_folder import checkpoint
from minimind_train.run_folder.record import RunRecord
from tests.helpers.runs import Said, config_of, metrics, steps


def test_a_run_folder_has_all_that_the_run_is(whole_run, small_dataset):
    assert {path.name for path in whole_run.iterdir()} == {
        "config.json",
        "run.toml",
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
    assert checkpoint.load(whole_run, 9).state.position == 72
    assert steps(whole_run) == list(range(1, 13))


def test_without_words_a_run_is_two_epochs_and_no_sample_is_lost(begin, tmp_path, small_dataset):
    n = len(open_windows(ShardSet.open(small_dataset), layout="concat", seq_len=16))
    outcome, _ = begin(steps=None, global_batch=31, log_every=100)
    assert outcome.total_steps == outcome.step == math.ceil(2 * n / 31)
    assert outcome.position == 2 * n
    assert RunRecord.read(tmp_path / "run").options["epochs"] == 2


def test_layout_pad_trains_too(begin, tmp_path):
    outcome, _ = begin(layout="pad", epochs=1, steps=None)
    assert outcome.position == 64
    assert all(0 < record["targets"] < 8 * 16 for record in metrics(tmp_path / "run"))


def test_layout_pack_trains_too(begin, tmp_path, small_dataset):
    shards = shutil.copytree(small_dataset, tmp_path / "data")
    packing = {"layout": "pack", "long_documents": "fragment", "seq_len": 12}
    outcome, said = begin(shards=shards, epochs=1, steps=None, **packing)
    windows = open_windows(ShardSet.open(shards), **packing)
    targets = windows.fetch(np.arange(len(windows)))["targets"]
    assert outcome.position == len(windows)
    assert sum(record["targets"] for record in metrics(tmp_path / "run")) == (targets != IGNORED).sum()
    assert any("of all positions filled" in line for line in said)


@pytest.mark.parametrize("layout", ["concat", "pad", "pack"])
def test_the_document_mask(tmp_path, small_dataset, layout):
    shards = shutil.copytree(small_dataset, tmp_path / "data")
    losses, targets = {}, {}
    for document_mask in (None, True, False):
        run = tmp_path / f"{document_mask}"
        chosen = {"layout": layout, "seq_len": 40, "steps": 2, "document_mask": document_mask}
        entry.begin(config_of(run, shards, **chosen), Said())
        assert RunRecord.read(run).options["document_mask"] is (
            layout == "pack" if document_mask is None else document_mask
        )
        losses[document_mask] = [record["loss"] for record in metrics(run)]
        targets[document_mask] = [record["targets"] for record in metrics(run)]
    assert losses[None] == losses[layout == "pack"]
    if layout == "pad":
        assert losses[True] == pytest.approx(losses[False], rel=1e-6)
    else:
        assert losses[True] != pytest.approx(losses[False], rel=1e-5)
    # Only concat has steps between documents to leave out.
    assert (targets[True] == targets[False]) is (layout != "concat")
    batches = open_windows(ShardSet.open(shards), layout=layout, seq_len=40, documents_apart=True)
    learned = batches.fetch(SampleOrder(num_windows=len(batches), seed=42).windows(np.arange(8)))["targets"]
    assert targets[True][0] == (learned != IGNORED).sum()


def test_a_run_of_more_steps_than_the_dataset_has_goes_on_into_further_epochs(begin, tmp_path):
    outcome, _ = begin(steps=5, global_batch=100, micro_batch=200)
    assert outcome.position == 500
    assert metrics(tmp_path / "run")[-1]["epoch"] >= 3
    assert RunRecord.read(tmp_path / "run").options["micro_batch"] == 100


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"seq_len": 100_000, "max_position_embeddings": 200_000}, "shorter `seq_len`"),
        ({"max_position_embeddings": 15}, "longer than the model's `max_position_embeddings` 15"),
        ({"shards": Path("nowhere")}, "no dataset"),
        ({"hidden_size": 2**20}, "parameters, .* GiB; take a smaller `hidden_size`"),
        ({"num_hidden_layers": 4096, "intermediate_size": 2**22}, "or `num_hidden_layers`"),
        ({"device": "cuda:77"}, "`device` cuda:77"),
        ({"device": "abacus"}, "`device` abacus"),
        ({"resume_from": "text-00000:4"}, "needs `order` sequential"),
        ({"order": "sequential", "resume_from": "text-00007:4"}, "text-00007"),
        ({"order": "sequential", "resume_from": "text-00000:4000000"}, "4000000"),
    ],
)
def test_what_cannot_be_run_leaves_no_folder(begin, tmp_path, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        begin(**changes)
    assert not (tmp_path / "run").exists()


def test_a_step_that_cannot_fit_leaves_no_folder(begin, tmp_path, monkeypatch):
    sizes = iter([10**9, 10**9])
    monkeypatch.setattr(devices, "memory_of", lambda _: next(sizes))
    with pytest.raises(
        UserError, match="the samples of a step take at least .* take a smaller `global_batch`"
    ):
        begin(global_batch=2**20, seq_len=100)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
        ),
        RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_runs_out_is_a_sentence(begin, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("minimind_train.training.loop.take_step", fail)
        with pytest.raises(
            UserError, match=r"^the memory is used up \(.+\); go on with `resume` and a smaller"
        ):
            begin()
    assert resume(tmp_path / "run", {"micro_batch": 1}, say=Said()).step == 12


def test_other_runtime_errors_are_ours(begin, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a defect")

    monkeypatch.setattr("minimind_train.training.loop.take_step", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        begin()
