"""A token outside of the vocabulary is refused with its shard and offset wherever windows are read, before it reaches a model."""

import numpy as np
import pytest

from minimind_data.dataset.format import FormatError
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.windows.opening import open_windows
from tests.helpers.commands import TINY, mm_data, mm_train
from tests.helpers.datasets import chat_dataset, text_dataset

VOCABULARY = 259


def spoil(folder, offset, token, name="text-00001"):
    """Write a token into a shard."""
    path = folder / f"{name}.bin"
    dtype = ShardSet.open(folder).dtype
    tokens = np.fromfile(path, dtype)
    tokens[offset] = token
    tokens.tofile(path)


@pytest.fixture
def folder(tmp_path):
    return text_dataset(tmp_path / "data")


SENTENCE = (
    "text-00001.bin: token 259 at offset 7 is outside of the vocabulary of 259 entries; `mm-data verify"
)


@pytest.mark.parametrize(
    ("layout", "seq_len"), [("concat", 16), ("pad", 16), ("pad", 5000), ("pack", 16), ("pack", 5000)]
)
def test_every_layout_refuses_it(folder, layout, seq_len):
    spoil(folder, 7, VOCABULARY)
    windows = open_windows(ShardSet.open(folder), layout=layout, seq_len=seq_len)
    with pytest.raises(FormatError, match=SENTENCE):
        windows.fetch(np.arange(len(windows)))


def test_the_largest_id_is_inside(folder):
    spoil(folder, 7, VOCABULARY - 1)
    windows = open_windows(ShardSet.open(folder), layout="concat", seq_len=16)
    assert len(windows.fetch(np.arange(len(windows)))["input_ids"]) == len(windows)


@pytest.mark.parametrize("token", [-1, 70_000, -(2**31)])
def test_int32_tokens_are_held_against_both_ends(make_dataset, token):
    shards = make_dataset([[9, 12], [30]], vocab_size=70_000)
    spoil(shards.folder, 3, token, "text-00000")
    with pytest.raises(FormatError, match=f"text-00000.bin: token {token} at offset 3 is outside"):
        ShardSet.open(shards.folder).rows(np.array([0, 20]), 10)


@pytest.mark.parametrize("command", ["window", "stats"])
def test_commands_that_show_a_dataset_refuse_it(folder, command):
    spoil(folder, 7, VOCABULARY)
    token = ShardSet.open(folder).token_at("text-00001", 7)
    arguments = [folder, token // 16, "--seq-len", 16] if command == "window" else [folder]
    result = mm_data(command, *arguments)
    assert result.exit_code == 1
    assert SENTENCE in result.output


def test_training_and_eval_stop_at_it(folder, tmp_path):
    run, options = tmp_path / "run", [*TINY, "--layout", "concat"]
    assert mm_train("pretrain", "--shards", folder, "--run", run, *options, "--steps", 2).exit_code == 0
    other = text_dataset(tmp_path / "other")
    for spoilt in (folder, other):
        spoil(spoilt, 7, VOCABULARY)
    for arguments in (
        ["pretrain", "--shards", folder, "--run", tmp_path / "second", *options, "--epochs", 1],
        ["eval", "--run", run, "--shards", other, "--device", "cpu"],
    ):
        result = mm_train(*arguments)
        assert result.exit_code == 1, result.output
        assert SENTENCE in result.output


def test_pairs_refuse_it_on_either_side(tmp_path):
    folder = chat_dataset(tmp_path / "chats", "dpo", 4)
    shards = ShardSet.open(folder)
    vocabulary = shards.manifest.tokenizer.vocab_size
    spoil(folder, shards.num_tokens - 2, vocabulary, shards.manifest.shards[0].name)
    windows = open_windows(ShardSet.open(folder), layout="pad", seq_len=400)
    with pytest.raises(FormatError, match=f"token {vocabulary} at offset {shards.num_tokens - 2} is outside"):
        windows.fetch(np.arange(len(windows)))
