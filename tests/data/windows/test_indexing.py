"""Windows and shards by number, as a notebook asks for them, and what they say of themselves there."""

import re

import numpy as np
import pytest

from minimind_data.tokenizer.loading import load_tokenizer
from minimind_data.windows.opening import open_windows

SHARDS = [[5, 9, 2], [40], [3, 3, 3, 3], [17, 2]]


@pytest.mark.parametrize("layout", ["concat", "pad", "pack"])
def test_a_window_is_a_row_of_a_batch(make_dataset, layout):
    windows = open_windows(make_dataset(SHARDS), layout=layout, seq_len=9)
    n = len(windows)
    batch = windows.fetch(np.arange(n))
    assert sorted(windows[0]) == sorted(batch)
    for name, rows in batch.items():
        for number in range(n):
            assert windows[number][name].tolist() == rows[number].tolist()
            assert windows[number - n][name].tolist() == rows[number].tolist()
        assert windows[np.int64(n - 1)][name].tolist() == rows[-1].tolist()
        assert windows[1:3][name].tolist() == rows[1:3].tolist()
        assert windows[::-1][name].tolist() == rows[::-1].tolist()
        assert windows[n:][name].shape == (0, 9)
        assert [sample[name].tolist() for sample in windows] == rows.tolist()


def test_a_window_that_is_not_there(make_dataset):
    windows = open_windows(make_dataset(SHARDS), layout="pad", seq_len=9)
    for number in (len(windows), -len(windows) - 1, np.int64(10**12)):
        with pytest.raises(IndexError, match=f"window {number} asked for, and there are {len(windows)}"):
            windows[number]
    with pytest.raises(TypeError):
        windows["0"]


def test_a_shard_by_its_number(make_dataset):
    shards = make_dataset(SHARDS)
    assert shards[0] is shards.shard(0)
    assert shards[-1] is shards[np.int64(3)] is shards.shard(3)
    assert shards[1:3] == [shards.shard(1), shards.shard(2)]
    assert list(shards) == shards[:]
    for number in (4, -5):
        with pytest.raises(IndexError, match=f"shard {number} asked for, and there are 4"):
            shards[number]


def test_what_they_say_of_themselves(make_dataset):
    shards = make_dataset(SHARDS)
    about = r"pretrain, 10 documents, 87 tokens in 4 shards of uint16, tokenizer of 6,400 entries \(\w{12}…\)"
    assert re.fullmatch(rf"ShardSet\('.*dataset': {about}\)", repr(shards))
    assert re.fullmatch(rf"Manifest\({about}, fingerprint \w{{12}}…\)", repr(shards.manifest))
    assert repr(shards[0]) == "Shard('text-00000': 3 documents, 16 tokens)"
    windows = open_windows(shards, layout="concat", seq_len=9)
    assert repr(windows) == f"ConcatWindows('{shards.folder}': 9 windows of 9 tokens with targets)"
    windows = open_windows(shards, layout="pack", seq_len=9, labels=True, documents_apart=True)
    assert repr(windows).endswith(" of 9 tokens with labels, documents apart)")


def test_what_a_tokenizer_says_of_itself():
    assert re.fullmatch(
        r"Tokenizer\(6,400 entries, BOS 1 '<\|im_start\|>', EOS 2 '<\|im_end\|>', PAD 0 '<\|endoftext\|>', \w{12}…\)",
        repr(load_tokenizer()),
    )
