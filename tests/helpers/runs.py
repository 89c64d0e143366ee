"""Runs of a few steps: options of a small one, what a run says and leaves on disk, and whether two are alike."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minimind_data.options import options_from
from minimind_train.model.config import ModelConfig
from minimind_train.run import entry
from minimind_train.run.options import PretrainOptions
from minimind_train.run_folder import checkpoint
from minimind_train.run_folder.metrics import FILE_NAME
from minimind_train.run_folder.record import RunRecord
from minimind_train.weights.loading import model_of

OPTIONS = {
    "seq_len": 16,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "global_batch": 8,
    "micro_batch": 4,
    "steps": 12,
    "threads": 1,
    "save_every": 3,
    "log_every": 1,
    "dtype": "fp32",
    "device": "cpu",
}
"""The options of a run that takes a second."""

SMALL_MODEL = ModelConfig(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    intermediate_size=40,
    vocab_size=53,
    max_position_embeddings=64,
)
"""A model of two layers whose sizes are all different, so that none can be taken for another."""


class Said(list):
    """Takes what a run says."""

    __call__ = list.append

    @property
    def text(self):
        return "\n".join(self)


def config_of(run, dataset, **changes):
    """The options of a run in this folder: `OPTIONS`, but for these."""
    return options_from(PretrainOptions, {**OPTIONS, "run": run, "shards": dataset, **changes})


def run_maker(tmp_path_factory, dataset, **defaults):
    """What makes runs by their options, and makes each once."""
    runs = {}

    def make(**options):
        key = json.dumps(options)
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("runs") / "run"
            entry.begin(config_of(runs[key], dataset, **(defaults | options)), Said())
        return runs[key]

    return make


def stop_after(run, step):
    """Take a finished run back to what it was after a checkpoint, but for its metrics, which a crash leaves ahead."""
    for later in checkpoint.steps_of(run):
        if later > step:
            shutil.rmtree(checkpoint.folder_of(run, later))
    replace(RunRecord.read(run), finished=None).write(run)


def weights(run: Path, step: int) -> bytes:
    """The weights of a checkpoint, byte for byte."""
    return (checkpoint.folder_of(run, step) / checkpoint.MODEL_NAME).read_bytes()


def records(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics, but for what no two runs share."""
    return [{**record, "tokens_per_second": 0} for record in records(run / FILE_NAME)]


def steps(run: Path) -> list[int]:
    """The steps that metrics.jsonl has lines of."""
    return [record["step"] for record in metrics(run)]


def assert_alike(run, other, num_steps, rel=1e-5):
    """Two runs of so many steps are equal in everything that is counted, and in losses and weights but for rounding."""
    ours, theirs = metrics(run), metrics(other)
    assert len(ours) == len(theirs) == num_steps
    for here, there in zip(ours, theirs, strict=True):
        assert here == {
            name: pytest.approx(value, rel=rel) if isinstance(value, float) else value
            for name, value in there.items()
        }
    here, there = (
        dict(model_of(each, step=num_steps, say=Said()).named_parameters()) for each in (run, other)
    )
    assert here.keys() == there.keys()
    for name, tensor in here.items():
        torch.testing.assert_close(tensor, there[name], rtol=10 * rel, atol=2 * rel)
