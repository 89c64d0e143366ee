"""What the tests of the command line share: both programs called in this process, and a dataset to train on."""

import json

import pytest
import torch

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions


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
