"""Layout pack: every document in one window, whole; every step inside a document learned once, none between two."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_data.dataset.format import IGNORED
from minimind_data.errors import UserError
from minimind_data.windows import assignment
from minimind_data.windows.opening import open_windows
from minimind_data.windows.pack_plan import LONG_DOCUMENTS

BOS, EOS, PAD = 1, 2, 0
SHARDS = [[5, 9, 2], [40], [3, 3, 3, 3], [17, 2]]
SMALL_BLOCKS = {"_BLOCK_DOCUMENTS": 3, "_BLOCK_FRAGMENTS": 2, "_BLOCK_WINDOWS": 2, "_BLOCK_SEGMENTS": 5}

lengths_strategy = st.one_of(
    st.lists(st.integers(2, 30), min_size=1, max_size=60),
    st.lists(st.integers(2, 400), min_size=1, max_size=20),
    st.builds(lambda length, count: [length] * count, st.integers(2, 50), st.integers(1, 40)),
    st.lists(st.integers(1, 8).map(lambda power: 2**power + 1), min_size=1, max_size=30),
    st.lists(st.sampled_from([2, 3, 60]), min_size=1, max_size=50),
    st.integers(2, 300).map(lambda length: [length]),
)


def documents_of(shards):
    return [
        shard.tokens[offset // 2 : offset // 2 + length].tolist()
        for shard in shards
        for offset, length in zip(shard.offsets, shard.lengths, strict=True)
    ]


def parts_of(document, width, long_documents):
    """What a document is in windows: lists of tokens."""
    if len(document) <= width:
        return [document]
    if long_documents == "cut":
        return [[*document[: width - 1], EOS]]
    if long_documents == "drop":
        return []
    return [document[start : start + width] for start in range(0, len(document) - 1, width - 1)]


def tokens_of(batch, labels):
    """The tokens of each window, and whether each is a target: [B, width] both."""
    if labels:
        return batch["input_ids"], batch["labels"] != IGNORED
    last = np.where(batch["targets"][:, -1:] == IGNORED, PAD, batch["targets"][:, -1:])
    tokens = np.concatenate([batch["input_ids"], last], axis=1)
    return tokens, np.pad(batch["targets"] != IGNORED, ((0, 0), (1, 0)))


def segments_by_hand(windows, batch):
    """Cut rows at the places that `segments` names, and see that it names what `document_ids` and `position_ids` show."""
    found = windows.segments(np.arange(len(windows)))
    tokens, _ = tokens_of(batch, windows.labels)
    cut = [
        (int(document), tokens[row, column : column + length].tolist())
        for row, column, length, document in zip(
            found.rows, found.columns, found.lengths, found.documents, strict=True
        )
    ]
    return found, cut


@pytest.mark.parametrize("small_blocks", [False, True])
@pytest.mark.parametrize("long_documents", LONG_DOCUMENTS)
@pytest.mark.parametrize("labels", [False, True])
def test_every_document_once_and_whole(make_dataset, monkeypatch, labels, long_documents, small_blocks):
    if small_blocks:
        for name, value in SMALL_BLOCKS.items():
            monkeypatch.setattr(assignment, name, value)
    names = map(str, itertools.count())

    @settings(deadline=None, max_examples=40)
    @given(lengths_strategy, st.integers(0, 60), st.integers(2, 70))
    def check(lengths, border, seq_len):
        shards = make_dataset([lengths[:border], lengths[border:]], name=next(names))
        documents = documents_of(shards)
        width = seq_len + (not labels)
        wanted = [
            (number, part)
            for number, document in enumerate(documents)
            for part in parts_of(document, width, long_documents)
        ]
        settings_ = {"layout": "pack", "seq_len": seq_len, "labels": labels, "long_documents": long_documents}
        if not wanted:
            with pytest.raises(UserError, match="longer `seq_len`, or `long_documents`"):
                open_windows(shards, **settings_)
            return
        windows = open_windows(shards, **settings_)
        batch = windows.fetch(np.arange(len(windows)))
        found, cut = segments_by_hand(windows, batch)
        tokens, learned = tokens_of(batch, labels)
        assert sorted(cut) == sorted(wanted)
        # What is no segment is PAD, and PAD is not learned.
        ids = found.document_ids(width)
        assert ((tokens == PAD) == (ids == -1)).all()
        assert not learned[ids == -1].any()
        # In every row each token is learned but the first of a segment; the row's own first is never predicted.
        first = np.zeros(tokens.shape, bool)
        first[found.rows, found.columns] = True
        assert (learned[:, 1:] == ((ids != -1) & ~first)[:, 1:]).all()
        steps = int(learned[:, 1:].sum())
        assert steps == sum(len(part) - 1 for _, part in wanted)
        left_out = sum(max(0, len(one) - width) for one in documents)
        left_out = {
            "cut": left_out,
            "fragment": 0,
            "drop": sum(len(one) for one in documents if len(one) > width),
        }
        assert windows.unused_tokens == left_out[long_documents]
        assert windows.padding == int((ids[:, :seq_len] == -1).sum())
        assert windows.plan.num_long == sum(len(one) > width for one in documents)
        # The order is that of the corpus, inside windows and roughly between them.
        for row in range(len(windows)):
            inside = found.documents[found.rows == row]
            assert (np.diff(inside) > 0).all()
        if not small_blocks:
            assert (np.diff(found.documents[found.columns == 0]) >= 0).all()

    check()


@pytest.mark.parametrize("labels", [False, True])
def test_a_document_alone_is_what_pad_makes_of_it(make_dataset, labels):
    shards = make_dataset([[12, 40], [11, 10, 13]])
    packed, padded = (
        open_windows(shards, layout=layout, seq_len=14, labels=labels) for layout in ("pack", "pad")
    )
    rows = np.arange(5)
    assert {name: array.tolist() for name, array in packed.fetch(rows).items()} == {
        name: array.tolist() for name, array in padded.fetch(rows).items()
    }
    assert (packed.unused_tokens, packed.padding) == (padded.unused_tokens, padded.padding)


def test_a_golden_plan(make_dataset):
    windows = open_windows(make_dataset(SHARDS), layout="pack", seq_len=18, long_documents="fragment")
    plan = windows.plan
    parts = list(zip(plan.documents.tolist(), plan.fragments.tolist(), strict=True))
    assert [parts[start:stop] for start, stop in itertools.pairwise(plan.offsets)] == [
        [(0, 0), (1, 0), (3, 2)],  # 5 + 9 + 4 tokens of 19
        [(2, 0), (8, 0)],
        [(3, 0)],
        [(3, 1)],
        [(4, 0), (5, 0), (6, 0), (7, 0), (9, 0)],
    ]
    assert windows.fetch(np.array([1]))["targets"].tolist() == [[2, IGNORED, *range(55, 70), 2]]


@pytest.mark.parametrize("long_documents", LONG_DOCUMENTS)
@pytest.mark.parametrize("seq_len", [2, 3, 5, 8, 39, 86])
def test_places_and_windows_invert(make_dataset, seq_len, long_documents):
    shards = make_dataset(SHARDS)
    windows = open_windows(shards, layout="pack", seq_len=seq_len, long_documents=long_documents)
    for number in range(len(windows)):
        assert windows.window_of(*windows.locate(number)) == number
    inputs = windows.fetch(np.arange(len(windows)))["input_ids"]
    found = windows.segments(np.arange(len(windows)))
    stream = np.concatenate([shard.tokens for shard in shards])
    documents = [length for shard in SHARDS for length in shard for _ in range(length)]
    for token in range(shards.num_tokens):
        shard, offset = shards.name_and_offset(token)
        if long_documents == "drop" and documents[token] > seq_len + 1:
            with pytest.raises(UserError, match=f"{shard}:{offset} .* longer than a window and left out"):
                windows.window_of(shard, offset)
            continue
        number = windows.window_of(shard, offset)
        here = (found.rows == number) & (found.starts <= token) & (token < found.starts + found.lengths)
        if not here.any():
            assert long_documents == "cut"
            continue
        column = int((found.columns + token - found.starts)[here][0])
        if column < seq_len and not (long_documents == "cut" and column == seq_len - 1):
            assert inputs[number, column] == stream[token]


@pytest.mark.parametrize("layout", ["concat", "pad", "pack"])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("seq_len", [2, 3, 7, 16, 41])
def test_documents_apart(make_dataset, layout, labels, seq_len):
    shards = make_dataset(SHARDS)
    chosen = {"layout": layout, "seq_len": seq_len, "labels": labels}
    apart = open_windows(shards, documents_apart=True, **chosen)
    together = open_windows(shards, **chosen)
    rows = np.arange(len(apart))
    batch, plain = apart.fetch(rows), together.fetch(rows)
    assert batch["input_ids"].tolist() == plain["input_ids"].tolist()
    assert batch["position_ids"].flags.c_contiguous
    ids = np.stack([apart.document_ids(row) for row in rows])
    wanted = np.zeros_like(ids)
    for row, column in np.ndindex(*ids.shape):
        if column and ids[row, column] == ids[row, column - 1]:
            wanted[row, column] = wanted[row, column - 1] + 1
    assert batch["position_ids"].tolist() == wanted.tolist()
    # No target is the first token of another document; all others stay what they were.
    name = "labels" if labels else "targets"
    if layout == "pack":
        assert batch[name].tolist() == plain[name].tolist()
    found = apart.segments(rows)
    stepped = np.zeros(found.shape, bool)
    stepped[found.rows, found.columns] = found.columns > 0
    stepped = stepped[:, 0 if labels else 1 :]
    assert (batch[name] == np.where(stepped, IGNORED, plain[name])).all()


def test_segments_of_concat_reach_over_shards(make_dataset):
    windows = open_windows(make_dataset(SHARDS), layout="concat", seq_len=16)
    found = windows.segments(np.array([3, 0]))
    stream = np.repeat(np.arange(10), [length for shard in SHARDS for length in shard])
    assert found.document_ids(17).tolist() == [stream[48:65].tolist(), stream[:17].tolist()]
    assert found.starts.tolist() == [48, 56, 59, 62, 0, 5, 14, 16]


@pytest.mark.parametrize(
    ("long_documents", "account"),
    [
        ("cut", "1 document longer than a window cut to one, 21 tokens in no window"),
        ("fragment", "1 document longer than a window spread over several, 0 tokens in no window"),
        ("drop", "1 document longer than a window left out, 40 tokens in no window"),
    ],
)
def test_what_is_lost_is_said(make_dataset, long_documents, account):
    shards = make_dataset(SHARDS)
    chosen = {"layout": "pack", "long_documents": long_documents}
    for _ in range(2):
        said = []
        open_windows(shards, seq_len=18, say=said.append, **chosen)
        assert said[-1].endswith(account)
    said = []
    windows = open_windows(shards, seq_len=39, say=said.append, **chosen)
    padding = sum(int((windows.document_ids(number) == -1).sum()) for number in range(len(windows)))
    share = 1 - padding / (39 * len(windows))
    assert said[-1] == f"{shards.folder}: packed, {share:.2%} of all positions filled"


@pytest.mark.parametrize("vocab_size", [6400, 70_000])
@pytest.mark.parametrize("lengths", [[64, 63, 65, 8, 7, 9, 128, 200, 2, 3], [300, 2, 2, 2], [2]])
def test_blocks_copy_what_slices_copy(make_dataset, lengths, vocab_size):
    shards = make_dataset([lengths, lengths[::-1]], vocab_size=vocab_size)
    windows = open_windows(shards, layout="pack", seq_len=300, labels=True)
    batch = windows.fetch(np.arange(len(windows)))
    found = windows.segments(np.arange(len(windows)))
    for row, column, length, start in zip(
        found.rows, found.columns, found.lengths, found.starts, strict=True
    ):
        row_tokens = batch["input_ids"][row, column : column + length]
        assert row_tokens.tolist() == shards.slice(start, start + length).tolist()


@pytest.mark.parametrize("long_documents", LONG_DOCUMENTS)
def test_windows_pickle_as_names(make_dataset, long_documents):
    shards = make_dataset(SHARDS)
    windows = open_windows(shards, layout="pack", seq_len=8, long_documents=long_documents)
    data = pickle.dumps(windows)
    again = pickle.loads(data)
    rows = np.arange(len(windows))
    for name, array in windows.fetch(rows).items():
        assert again.fetch(rows)[name].tolist() == array.tolist()
    (plan,) = (shards.folder / ".mm-pack").iterdir()
    plan.unlink()
    with pytest.raises(UserError, match="gone or changed; start again"):
        pickle.loads(data)


def test_a_pad_that_is_eos_is_learned(make_dataset):
    shards = make_dataset([[6, 4]])
    shards.manifest.tokenizer.__dict__["pad_id"] = EOS
    windows = open_windows(shards, layout="pack", seq_len=12, labels=True)
    batch = windows.fetch(np.array([0]))
    assert batch["labels"].tolist() == [[1, 3, 4, 5, 6, 2, IGNORED, 7, 8, 2, IGNORED, IGNORED]]
    assert batch["input_ids"].tolist() == [[1, 3, 4, 5, 6, 2, 1, 7, 8, 2, 2, 2]]
