"""Datasets and runs that commit f31dd0d wrote are opened, built on and gone on with: the same bytes, the same samples, the same losses."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.builds import tree
from tests.helpers.commands import mm_data, mm_train
from tests.helpers.runs import records

BEFORE = Path(__file__).parent
WENT_ON = json.loads((BEFORE / "went_on.json").read_bytes())
RUNS = {
    "pack": ("pretrain", "--shards", "data/pre"),
    "mixture": ("pretrain", "--shards", "a=data/pre:7", "--shards", "b=data/shuffled:3"),
    "moe": ("pretrain", "--shards", "data/pre", "--val-shards", "data/pre/val"),
    "sft": ("sft", "--shards", "data/sft"),
    "dpo": ("dpo", "--shards", "data/dpo", "--from-weight", "runs/sft"),
}
"""Each run's command, and where the data are that its record has in another folder."""

COUNTED = {"step", "position", "epoch", "epochs", "targets", "lr", "val_targets", "val_bytes"}
"""What depends on no rounding; all else in a line of metrics is measured."""

BUILDS = {
    "pre": ["sample.jsonl", "--val-fraction", "0.1", "--dedup", "exact", "--split-bytes", "8KiB"],
    "sft": ["sample_sft.jsonl", "--kind", "sft"],
    "dpo": ["sample_dpo.jsonl", "--kind", "dpo"],
}


@pytest.fixture
def before(tmp_path, monkeypatch):
    """A copy of all that stands here, in which this process works."""
    shutil.copytree(BEFORE, tmp_path / "before")
    monkeypatch.chdir(tmp_path / "before")
    threads = torch.get_num_threads()
    yield tmp_path / "before"
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dataset", ["pre", "pre/val", "sft", "dpo", "shuffled"])
def test_the_datasets_are_whole(before, dataset):
    result = mm_data("verify", f"data/{dataset}")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", BUILDS)
def test_a_build_finds_its_dataset_finished_and_a_new_one_is_the_same_to_the_byte(before, name):
    finished = tree(before / "data" / name)
    options = ["tokenize", *BUILDS[name], "--tokenizer", "tokenizer", "--workers", "1", "--out"]
    again = mm_data(*options, f"data/{name}")
    assert again.exit_code == 0, again.output
    assert "already" in again.output
    assert tree(before / "data" / name) == finished
    anew = mm_data(*options, "anew")
    assert anew.exit_code == 0, anew.output
    derived = (".mm-pack", "reference")
    assert tree(before / "anew") == {
        path: content for path, content in finished.items() if not path.startswith(derived)
    }


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("typed", [True, False])
def test_the_runs_go_on_with_the_same_samples_and_losses(before, name, typed):
    metrics = before / "runs" / name / "metrics.jsonl"
    lines_before = metrics.read_bytes()
    command, *where = RUNS[name]
    result = mm_train(command, "--run", f"runs/{name}", "--resume", *(where if typed else ()))
    assert result.exit_code == 0, result.output
    assert metrics.read_bytes().startswith(lines_before)
    lines = records(metrics)[lines_before.count(b"\n") :]
    assert [line["step"] for line in lines] == [8, 9, 10, 11, 12]
    for line, expected in zip(lines, WENT_ON[name], strict=True):
        assert {key: line[key] for key in expected if key in COUNTED} == {
            key: value for key, value in expected.items() if key in COUNTED
        }
        measured = {key: value for key, value in expected.items() if key not in COUNTED}
        # Other machines round otherwise; rewards are differences of sums that are hundreds of times as large.
        assert {key: line[key] for key in measured} == pytest.approx(measured, rel=1e-5, abs=1e-4)
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
