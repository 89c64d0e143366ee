"""What the tests of the command line share: both programs called in this process, and a dataset to train on."""

import json

import pytest
import torch
from typer.testing import CliRunner

from minimind_cli import data
from minimind_cli.train import make
from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions

TINY = [
    *("--seq-len", "32", "--hidden-size", "16", "--num-hidden-layers", "1", "--num-attention-heads", "2"),
    *("--num-key-value-heads", "1", "--global-batch", "4", "--threads", "1", "--device", "cpu"),
]
"""The options of a model that trains in no time."""


def mm_data(*arguments, **options):
    """Call mm-data; `options` are those of `CliRunner.invoke`."""
    return CliRunner().invoke(data.app, list(map(str, arguments)), **options)


def mm_train(*arguments, **options):
    """Call mm-train; `options` are those of `CliRunner.invoke`."""
    arguments = list(map(str, arguments))
    return CliRunner().invoke(make(arguments), arguments, **options)


@pytest.fixture(autouse=True)
def _threads_are_put_back():
    former = torch.get_num_threads()
    yield
    torch.set_num_threads(former)


@pytest.fixture(scope="session")
def training_data(tmp_path_factory):
    """The folder of a dataset of 99 short texts in the tokenizer that ships with the package; read only."""
    folder = tmp_path_factory.mktemp("dataset")
    lines = [
        json.dumps({"text": f"问题{i}的答案是{i * i}。 The answer is {i * i}.<|im_end|>"}) for i in range(99)
    ]
    (folder / "text.jsonl").write_text("\n".join(lines))
    tokenize([folder / "text.jsonl"], TokenizeOptions(out=folder / "data", workers=1))
    return folder / "data"
