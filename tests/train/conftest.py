"""What the tests of training share: one thread, a small dataset with a tokenizer of single bytes, what a run has written."""

import shutil
from pathlib import Path

import pytest
import torch

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_train.run import entry
from tests.helpers.datasets import chat_dataset, text_dataset
from tests.helpers.runs import Said, config_of, stop_after


@pytest.fixture(autouse=True)
def _one_thread():
    """One thread of torch in a test, which keeps sums in one order; the former number after it."""
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a dataset with two shards, text-00000 and text-00001; read only."""
    return text_dataset(tmp_path_factory.mktemp("dataset") / "data")


@pytest.fixture(scope="session")
def other_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of another dataset with the same tokenizer."""
    return text_dataset(tmp_path_factory.mktemp("dataset") / "other", seed=1)


@pytest.fixture
def begin(tmp_path, small_dataset):
    """Begin a run in the folder tmp_path/run."""

    def begin(**changes):
        said = Said()
        outcome = entry.begin(config_of(tmp_path / "run", small_dataset, **changes), said)
        return outcome, said

    return begin


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory, small_dataset):
    """A run that was never stopped, all of whose checkpoints were kept; read only."""
    run = tmp_path_factory.mktemp("whole") / "run"
    entry.begin(config_of(run, small_dataset, keep=0, dropout=0.1), Said())
    return run


@pytest.fixture
def stopped_run(tmp_path, whole_run):
    """The whole run as it was after step 6, its metrics some steps ahead."""
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    stop_after(run, 6)
    return run


@pytest.fixture(scope="session")
def sft_dataset(tmp_path_factory):
    """The folder of a dataset of 40 conversations of two turns; a packing plan may be written into it."""
    return chat_dataset(tmp_path_factory.mktemp("sft") / "chats", "sft")


@pytest.fixture(scope="session")
def dpo_dataset(tmp_path_factory):
    """The folder of a dataset of 40 pairs of the same tokenizer; log-probabilities may be written into it."""
    return chat_dataset(tmp_path_factory.mktemp("dpo") / "chats", "dpo")


@pytest.fixture(scope="session")
def chat_base(tmp_path_factory):
    """A run of three steps on text of the same tokenizer, to begin from; read only."""
    folder = tmp_path_factory.mktemp("chat-base")
    (folder / "text.txt").write_text("That is what 4 + 4 is. Yes. I do not know.\n" * 40)
    tokenize([folder / "text.txt"], TokenizeOptions(out=folder / "data", workers=1))
    entry.begin(config_of(folder / "run", folder / "data", steps=3, learning_rate=3e-3), Said())
    return folder / "run"
