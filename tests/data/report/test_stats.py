"""Stats: waste is what the windows themselves show, characters are what decoding gives."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.dataset.format import IGNORED, FormatError
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.report import statistics as module
from minimind_data.report.statistics import Lengths, count_text, measure_lengths, stats
from minimind_data.tokenizer.edge_cases import edge_case_texts
from minimind_data.tokenizer.loading import load_tokenizer
from minimind_data.windows.opening import open_windows

SAMPLE = Path(__file__).parents[3] / "data" / "sample.jsonl"
SHARDS = [[5, 9, 2], [40], [3, 3, 3, 3], [17, 2]]
NUM_TOKENS, NUM_DOCUMENTS = 87, 10


@pytest.mark.parametrize("block", [1, 3, 2**20])
@pytest.mark.parametrize("seq_len", [2, 3, 5, 7, 9, 16, 39, 40, 41, 43, 85, 86])
def test_waste_is_what_a_count_over_all_windows_gives(make_dataset, monkeypatch, seq_len, block):
    monkeypatch.setattr(module, "_BLOCK", block)
    shards = make_dataset(SHARDS)
    _, wastes = measure_lengths(shards, [seq_len])
    assert [waste.layout for waste in wastes] == ["concat", "pad", "pack"]
    for waste in wastes:
        windows = open_windows(shards, layout=waste.layout, seq_len=seq_len)
        batch = windows.fetch(np.arange(len(windows)))
        documents = [windows.document_ids(number) for number in range(len(windows))]
        assert waste.windows == len(windows)
        assert waste.unused_tokens == windows.unused_tokens
        assert waste.unused_share == windows.unused_tokens / NUM_TOKENS
        padding = [int((row == -1).sum()) for row in documents]
        assert waste.padding == sum(padding)
        assert waste.padding_share == sum(padding) / (len(windows) * seq_len)
        assert waste.padded_windows == sum(one > 0 for one in padding)
        learned = int((batch["targets"] != IGNORED).sum())
        if waste.layout != "concat":
            assert learned == NUM_TOKENS - waste.unused_tokens - NUM_DOCUMENTS
            lengths = [length for shard in SHARDS for length in shard]
            assert waste.cut_documents == sum(length > windows.width for length in lengths)
            assert waste.cut_share == waste.cut_documents / NUM_DOCUMENTS
            assert waste.windows_per_document == 1
        else:
            assert learned == NUM_TOKENS - 1 - waste.unused_tokens


@pytest.mark.parametrize("seq_len", [2, 3, 5, 9, 43, 86])
def test_cut_documents_stand_on_both_sides_of_a_border(make_dataset, seq_len):
    _, (concat, _, _) = measure_lengths(make_dataset(SHARDS), [seq_len])
    stream = np.repeat(np.arange(NUM_DOCUMENTS), [length for shard in SHARDS for length in shard])
    windows_of = [set(np.flatnonzero(stream == document) // seq_len) for document in range(NUM_DOCUMENTS)]
    assert concat.cut_documents == sum(len(windows) > 1 for windows in windows_of)
    assert concat.cut_share == concat.cut_documents / NUM_DOCUMENTS
    assert concat.windows_per_document == sum(map(len, windows_of)) / NUM_DOCUMENTS


def test_where_there_is_no_window_all_tokens_are_lost(make_dataset):
    _, (concat, pad, pack) = measure_lengths(make_dataset(SHARDS), [87])
    assert (concat.windows, concat.unused_tokens, concat.unused_share) == (0, 87, 1.0)
    assert (pad.windows, pad.unused_tokens) == (10, 0)
    assert (pack.windows, pack.unused_tokens, pack.padding) == (1, 0, 0)


@pytest.mark.parametrize("short", [0, 4, 2**16])
def test_lengths_are_counted_one_by_one(make_dataset, monkeypatch, short):
    monkeypatch.setattr(module, "_SHORT", short)
    lengths, _ = measure_lengths(make_dataset(SHARDS), [8])
    assert dict(zip(lengths.tokens.tolist(), lengths.documents.tolist(), strict=True)) == {
        2: 2,
        3: 4,
        5: 1,
        9: 1,
        17: 1,
        40: 1,
    }
    assert [lengths.percentile(percent) for percent in (20, 21, 50, 60, 70, 99, 100)] == [
        2,
        3,
        3,
        3,
        5,
        40,
        40,
    ]


@pytest.mark.parametrize("lengths", [[2], [2, 3], [7, 7000], [1000, 1001], list(range(2, 3000)), [2, 2**40]])
def test_bins_hold_every_document_once(lengths):
    found = Lengths(tokens=np.array(lengths), documents=np.arange(1, len(lengths) + 1))
    bins = found.bins()
    assert 1 <= len(bins) <= 48
    assert [one["to"] + 1 for one in bins[:-1]] == [one["from"] for one in bins[1:]]
    for one in bins:
        inside = [(n, count) for count, n in enumerate(lengths, 1) if one["from"] <= n <= one["to"]]
        assert one["documents"] == sum(count for _, count in inside)
        assert one["tokens"] == sum(n * count for n, count in inside)
    assert sum(one["documents"] for one in bins) == found.documents.sum()
    assert bins[0]["documents"]
    assert bins[-1]["documents"]


def test_characters_are_those_of_the_decoded_text(tmp_path, write_jsonl):
    tokenizer = load_tokenizer()
    texts = [text for text in edge_case_texts(tokenizer.added_tokens) if text]
    tokenize([SAMPLE, write_jsonl(texts)], TokenizeOptions(out=tmp_path / "d", workers=1, split_bytes=2**16))
    shards = ShardSet.open(tmp_path / "d")
    reports = []
    found = count_text(
        shards,
        load_tokenizer(tmp_path / "d"),
        lambda _title, _bytes: nullcontext(lambda num_bytes, _tokens: reports.append(num_bytes)),
    )
    decoded = [
        tokenizer.decode(shard.tokens[offset // 2 + 1 : offset // 2 + length - 1].tolist())
        for shard in shards
        for offset, length in zip(shard.offsets.tolist(), shard.lengths.tolist(), strict=True)
    ]
    assert len(shards) > 3
    assert found.estimated_from_documents is None
    assert found.characters == sum(map(len, decoded))
    assert found.bytes == sum(len(text.encode()) for text in decoded)
    assert found.tokens == shards.num_tokens - 2 * shards.num_documents
    assert found.characters_per_token == found.characters / found.tokens
    assert found.ids_used == len(np.unique(np.concatenate([shard.tokens for shard in shards])))
    assert sum(reports) == 2 * shards.num_tokens


def test_a_vocabulary_of_another_kind_is_estimated_from_documents(tmp_path, write_jsonl, monkeypatch):
    monkeypatch.setattr(module, "SAMPLED_DOCUMENTS", 5)
    words = ["<s>", "</s>", "<pad>", "<unk>", "你好", "b"]
    model = tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    source = write_jsonl(["你好 b 你好"] * 20)
    tokenize([source], TokenizeOptions(out=tmp_path / "d", tokenizer=tmp_path, workers=1))
    found = count_text(ShardSet.open(tmp_path / "d"), load_tokenizer(tmp_path / "d"))
    assert found.estimated_from_documents == 5
    assert found.tokens == 60
    assert (found.characters, found.bytes) == (20 * 7, 20 * 15)  # decoded with spaces between the words


def test_a_token_outside_the_vocabulary_is_named(tmp_path, write_jsonl):
    tokenize([write_jsonl(["a text"])], TokenizeOptions(out=tmp_path / "d", workers=1))
    path = tmp_path / "d" / "text-00000.bin"
    tokens = np.frombuffer(path.read_bytes(), "<u2").copy()
    tokens[1] = 6400
    path.write_bytes(tokens.tobytes())
    with pytest.raises(
        FormatError,
        match=r"text-00000\.bin: token 6400 at offset 1 is outside of the vocabulary of 6,400 entries; `mm-data verify",
    ):
        count_text(ShardSet.open(tmp_path / "d"), load_tokenizer(tmp_path / "d"))


def test_a_token_outside_the_vocabulary_is_named_by_its_shard_where_others_are_empty(make_dataset):
    shards = make_dataset([[5], [], [3, 4], [], [6]])
    last = shards.folder / f"{shards.manifest.shards[-1].name}.bin"
    tokens = np.frombuffer(last.read_bytes(), "<u2").copy()
    tokens[2] = 6400
    last.write_bytes(tokens.tobytes())
    with pytest.raises(FormatError, match=rf"{last.name}: token 6400 at offset 2 is outside"):
        count_text(ShardSet.open(shards.folder), load_tokenizer())


def test_what_cannot_be_described_is_refused(make_dataset):
    with pytest.raises(UserError, match="`seq_len` 1: "):
        measure_lengths(make_dataset(SHARDS), [8, 1])
    with pytest.raises(UserError, match="holds no document"):
        measure_lengths(make_dataset([[]], name="empty"), [8])


def test_the_whole_is_one_object_for_json(tmp_path):
    tokenize([SAMPLE], TokenizeOptions(out=tmp_path / "d", workers=1, tokenizer="default"))
    found = stats(ShardSet.open(tmp_path / "d"), load_tokenizer(tmp_path / "d"), [340, 512])
    told = found.as_dict()
    assert json.loads(json.dumps(told)) == told
    assert (told["documents"], told["tokens"]) == (333, 59313)
    assert [(one["seq_len"], one["layout"]) for one in told["layouts"]] == [
        (340, "concat"),
        (340, "pad"),
        (340, "pack"),
        (512, "concat"),
        (512, "pad"),
        (512, "pack"),
    ]
    assert round(told["text"]["characters_per_token"], 2) == 2.10
