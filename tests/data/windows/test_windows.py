"""Windows: every token is a target once (concat), every document stands in one window (pad)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_data.dataset.format import IGNORED
from minimind_data.errors import UserError
from minimind_data.windows.opening import open_windows

SHARDS = [[5, 9, 2], [40], [3, 3, 3, 3], [17, 2]]


def stream_of(shards):
    return np.concatenate([shard.tokens for shard in shards]).astype(int)


def documents_of(shards):
    return [
        shard.tokens[offset // 2 : offset // 2 + length].tolist()
        for shard in shards
        for offset, length in zip(shard.offsets, shard.lengths, strict=True)
    ]


@pytest.mark.parametrize("seq_len", [1, 2, 3, 7, 40, 86])
def test_concat_makes_every_token_a_target_once(make_dataset, seq_len):
    shards = make_dataset(SHARDS)
    windows = open_windows(shards, layout="concat", seq_len=seq_len)
    batch = windows.fetch(np.arange(len(windows)))
    stream = stream_of(shards)
    used = len(windows) * seq_len
    assert batch["input_ids"].reshape(-1).tolist() == stream[:used].tolist()
    assert batch["targets"].reshape(-1).tolist() == stream[1 : used + 1].tolist()
    assert windows.unused_tokens == len(stream) - 1 - used < seq_len


def test_concat_labels_are_the_inputs(make_dataset):
    shards = make_dataset(SHARDS)
    windows = open_windows(shards, layout="concat", seq_len=8, labels=True)
    batch = windows.fetch(np.arange(len(windows)))
    assert batch["labels"].tolist() == batch["input_ids"].tolist()
    assert batch["input_ids"].reshape(-1).tolist() == stream_of(shards)[: len(windows) * 8].tolist()
    assert windows.unused_tokens == 87 % 8


def pad_reference(document, max_length):
    """MiniMind's PretrainDataset, from its description: BOS + the first max_length - 2 ids + EOS, PAD, labels -100 at PAD."""
    inner = document[1:-1][: max_length - 2]
    row = [1, *inner, 2]
    row += [0] * (max_length - len(row))
    return row, [IGNORED if token == 0 else token for token in row]


@pytest.mark.parametrize("seq_len", [2, 3, 9, 10, 39, 40, 41, 86, 87, 200])
def test_pad_unshifted_is_minimind(make_dataset, seq_len):
    shards = make_dataset(SHARDS)
    windows = open_windows(shards, layout="pad", seq_len=seq_len, labels=True)
    batch = windows.fetch(np.arange(len(windows)))
    wanted = [pad_reference(document, seq_len) for document in documents_of(shards)]
    assert batch["input_ids"].tolist() == [row for row, _ in wanted]
    assert batch["labels"].tolist() == [labels for _, labels in wanted]
    assert windows.unused_tokens == sum(max(0, len(document) - seq_len) for document in documents_of(shards))


@pytest.mark.parametrize("seq_len", [2, 3, 9, 39, 40, 86, 87])
def test_pad_shifted_is_cut_from_one_token_more(make_dataset, seq_len):
    shards = make_dataset(SHARDS)
    windows = open_windows(shards, layout="pad", seq_len=seq_len)
    batch = windows.fetch(np.arange(len(windows)))
    wanted = [pad_reference(document, seq_len + 1) for document in documents_of(shards)]
    assert batch["input_ids"].tolist() == [row[:-1] for row, _ in wanted]
    assert batch["targets"].tolist() == [labels[1:] for _, labels in wanted]


def test_a_pad_inside_a_text_is_not_learned_unless_it_is_eos(make_dataset):
    shards = make_dataset([[6]])
    path = shards.folder / "text-00000.bin"
    path.write_bytes(np.array([1, 5, 0, 6, 7, 2], "<u2").tobytes())
    windows = open_windows(shards, layout="pad", seq_len=8, labels=True)
    assert windows.fetch(np.array([0]))["labels"].tolist() == [[1, 5, IGNORED, 6, 7, 2, IGNORED, IGNORED]]


@pytest.mark.parametrize("layout", ["concat", "pad", "pack"])
def test_batches_do_not_depend_on_company(make_dataset, layout):
    windows = open_windows(make_dataset(SHARDS), layout=layout, seq_len=6)
    whole = windows.fetch(np.arange(len(windows)))

    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.integers(0, len(windows) - 1), min_size=1, max_size=30))
    def check(chosen):
        batch = windows.fetch(np.array(chosen))
        for name, rows in whole.items():
            assert batch[name].dtype == np.int64
            assert batch[name].flags.c_contiguous
            assert batch[name].tolist() == rows[chosen].tolist()

    check()


def test_places_and_windows_invert(make_dataset):
    shards = make_dataset(SHARDS)
    for layout in ("concat", "pad", "pack"):
        windows = open_windows(shards, layout=layout, seq_len=6)
        for number in range(len(windows)):
            assert windows.window_of(*windows.locate(number)) == number


def test_every_token_lies_in_the_window_that_is_named(make_dataset):
    shards = make_dataset(SHARDS)
    for layout in ("concat", "pad"):
        windows = open_windows(shards, layout=layout, seq_len=40)
        for token in range(80):
            shard, offset = shards.name_and_offset(token)
            number = windows.window_of(shard, offset)
            start = shards.token_at(*windows.locate(number))
            assert (
                windows.fetch(np.array([number]))["input_ids"][0, token - start] == stream_of(shards)[token]
            )


def test_document_ids_change_at_every_bos(make_dataset):
    shards = make_dataset(SHARDS)
    windows = open_windows(shards, layout="concat", seq_len=6)
    ids = np.concatenate([windows.document_ids(number) for number in range(len(windows))])
    assert ids.tolist() == (np.cumsum(stream_of(shards)[: len(ids)] == 1) - 1).tolist()
    padded = open_windows(shards, layout="pad", seq_len=6)
    assert padded.document_ids(2).tolist() == [2, 2, -1, -1, -1, -1]


def test_the_tail_has_no_window(make_dataset):
    windows = open_windows(make_dataset(SHARDS), layout="concat", seq_len=80)
    with pytest.raises(UserError, match="last 6 tokens, which fill no window of 80"):
        windows.window_of("text-00003", 18)


@pytest.mark.parametrize(
    ("layout", "seq_len", "complaint"),
    [
        ("concat", 87, "shorter `seq_len` or more text"),
        ("concat", 0, "at least 1"),
        ("pad", 1, "too short for layout pad"),
        ("pack", 1, "too short for layout pack"),
    ],
)
def test_impossible_lengths_are_refused(make_dataset, layout, seq_len, complaint):
    with pytest.raises(UserError, match=complaint):
        open_windows(make_dataset(SHARDS), layout=layout, seq_len=seq_len)


def test_windows_out_of_range_are_refused(make_dataset):
    for layout in ("concat", "pad", "pack"):
        windows = open_windows(make_dataset(SHARDS, name=layout), layout=layout, seq_len=6)
        for number in (-1, len(windows)):
            with pytest.raises(IndexError):
                windows.fetch(np.array([number]))


@pytest.mark.parametrize(
    ("layout", "seq_len", "account"),
    [
        ("concat", 10, "cut every 10 tokens; at the end, 6 tokens in no window"),
        ("concat", 28, None),
        (
            "pad",
            10,
            "padded, 67.50% of all positions filled; documents longer than a window cut to one, 28 tokens in no window",
        ),
        ("pad", 50, "padded, 28.50% of all positions filled"),
    ],
)
def test_what_is_cut_padded_or_left_over_is_said_where_somebody_listens(
    make_dataset, layout, seq_len, account
):
    lengths = [[5, 33], [17, 2]]
    shards = make_dataset(lengths)
    said = []
    windows = open_windows(shards, layout=layout, seq_len=seq_len, say=said.append)
    assert said == ([f"{shards.folder}: {account}"] if account else [])
    learned = sum(
        int((windows.fetch(np.array([number]))["targets"] != IGNORED).sum()) for number in range(len(windows))
    )
    total = sum(length - 1 for shard in lengths for length in shard)
    if layout == "pad":
        assert learned == total - windows.unused_tokens
    else:
        assert learned == shards.num_tokens - 1 - windows.unused_tokens
