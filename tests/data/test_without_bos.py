"""Datasets of a tokenizer without BOS, as those of Qwen's family: every document is its tokens and EOS, in all that reads or writes them."""

import itertools
import json
import shutil
import struct
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from tokenizers import normalizers

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.chat.template import chat_template_of, render_chat
from minimind_data.dataset.format import IGNORED, FormatError, Manifest
from minimind_data.dataset.merging import MergeOptions, merge
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.dataset.shuffling import ShuffleOptions, shuffle
from minimind_data.dataset.verification import verify
from minimind_data.errors import UserError
from minimind_data.interchange.conversion import ConvertOptions, convert
from minimind_data.interchange.formats import ALIASES, FORMATS
from minimind_data.report import statistics
from minimind_data.report.page import write_page
from minimind_data.report.statistics import stats
from minimind_data.tokenizer.loading import NONE, SpecialTokens, load_tokenizer
from minimind_data.tokenizer.token_bytes import token_bytes_of
from minimind_data.windows.opening import open_windows
from minimind_data.windows.pack_plan import LONG_DOCUMENTS
from tests.helpers.chats import BRACKETS, CHATML, PLAIN, make_tokenizer
from tests.helpers.commands import mm_data
from tests.helpers.datasets import byte_tokenizer

PAD, START, EOS = 0, 1, 2
TEXTS = [
    "The first text, of some length.",
    "",
    "b",
    "   ",  # not empty, but the tokenizer makes no token of it
    "北京的猫头鹰",
    "<|im_start|>begins with a special token",
    "ends with one<|im_end|>",
    "a\nb",
    *(f"{number} " + "and so on " * (number % 7) for number in range(40)),
    "the last",
]


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    """A tokenizer of single bytes that strips texts, whose config says that there is no BOS; read only."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = byte_tokenizer()
    tokenizer.normalizer = normalizers.Strip()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def folder(shared_folder, tmp_path):
    """The same tokenizer, for a test to change."""
    return shutil.copytree(shared_folder, tmp_path / "tok")


@pytest.fixture(scope="module")
def shared_dataset(shared_folder, tmp_path_factory):
    """A dataset of TEXTS in two shards, beside its inputs one.jsonl and two.jsonl; read only."""
    place = tmp_path_factory.mktemp("dataset")
    for name, texts in (("one", TEXTS[:9]), ("two", TEXTS[9:])):
        (place / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = TokenizeOptions(out=place / "data", tokenizer=shared_folder, workers=1)
    tokenize([place / "one.jsonl", place / "two.jsonl"], options)
    return place / "data"


@pytest.fixture
def dataset(shared_dataset, tmp_path):
    """The same dataset, for a test to change, with its inputs beside it."""
    shutil.copytree(shared_dataset.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "data"


def expected_documents(folder, texts=TEXTS):
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [[*tokenizer.encode(text).ids, EOS] for text in texts if text]


def read_as_megatron(folder):
    """The documents of all shards, as Megatron's reader finds them: by the lengths and offsets in the index."""
    documents = []
    for entry in json.loads((folder / "manifest.json").read_text())["shards"]:
        index = (folder / f"{entry['name']}.idx").read_bytes()
        magic, version, code, num_sequences, num_starts = struct.unpack_from("<9sQBQQ", index)
        assert (magic, version, code, num_starts) == (b"MMIDIDX\0\0", 1, 8, num_sequences + 1)
        lengths = np.frombuffer(index, "<i4", num_sequences, 34)
        offsets = np.frombuffer(index, "<i8", num_sequences, 34 + 4 * num_sequences)
        starts = np.frombuffer(index, "<i8", num_starts, 34 + 12 * num_sequences)
        assert starts.tolist() == list(range(num_starts))
        data = (folder / f"{entry['name']}.bin").read_bytes()
        for length, offset in zip(lengths.tolist(), offsets.tolist(), strict=True):
            documents.append(np.frombuffer(data, "<u2", length, offset).tolist())
        assert 2 * lengths.sum() == len(data)
    return documents


def test_documents_are_their_tokens_and_eos(dataset, folder):
    assert read_as_megatron(dataset) == expected_documents(folder)
    assert [EOS] in expected_documents(folder)  # the text of which no token is left
    manifest = Manifest.read(dataset)
    assert json.loads((dataset / "manifest.json").read_text())["tokenizer"]["bos_id"] is None
    assert manifest.tokenizer.special_ids == (None, EOS, PAD)
    assert manifest.empty_texts == 1
    assert not verify(dataset).problems
    assert load_tokenizer(dataset).info == manifest.tokenizer


def test_the_commands_say_so(folder, write_jsonl, tmp_path):
    path, out = write_jsonl(TEXTS), tmp_path / "data"
    built = mm_data("tokenize", path, "--out", out, "--tokenizer", folder, "--workers", 1)
    assert "48 documents" in built.stdout
    assert "(uint16, documents without BOS)" in built.stdout
    assert "259 entries, no BOS, EOS <|im_end|> (2), PAD <|endoftext|> (0), " in mm_data("info", out).stdout
    assert json.loads(mm_data("info", out, "--json").stdout)["tokenizer"]["bos_id"] is None
    again = mm_data("tokenize", path, "--out", out, "--tokenizer", folder, "--bos-token", "none")
    assert "already done" in again.stdout
    with_bos = mm_data("tokenize", path, "--out", tmp_path / "with", "--workers", 1)
    assert "(uint16)" in with_bos.stdout


def test_a_validation_part_has_none_either(folder, write_jsonl, tmp_path):
    options = TokenizeOptions(out=tmp_path / "data", tokenizer=folder, workers=1, val_fraction=0.3)
    tokenize([write_jsonl(TEXTS)], options)
    parts = [read_as_megatron(tmp_path / "data"), read_as_megatron(tmp_path / "data" / "val")]
    assert all(parts)
    assert sorted(parts[0] + parts[1]) == sorted(expected_documents(folder))
    assert Manifest.read(tmp_path / "data" / "val").tokenizer.bos_id is None


def test_a_dataset_grows_by_documents_without_bos_only(dataset, folder, write_jsonl, tmp_path):
    inputs = [tmp_path / "one.jsonl", tmp_path / "two.jsonl", write_jsonl(["more"], "three.jsonl")]
    for named in ({}, {"tokenizer": folder}):
        options = TokenizeOptions(out=dataset, workers=1, bos_token="<|im_start|>", **named)
        with pytest.raises(
            UserError, match=r"made differently: `bos_token` is none there and '<\|im_start\|>' here; to add"
        ):
            tokenize(inputs, options)
    assert tokenize(inputs, TokenizeOptions(out=dataset, workers=1)).kept_shards == 2
    assert read_as_megatron(dataset) == expected_documents(folder, [*TEXTS, "more"])
    for same in (
        {"tokenizer": folder},
        {"tokenizer": dataset},
        {"bos_token": NONE},
        {"eos_token": "<|im_end|>"},
    ):
        assert tokenize(inputs, TokenizeOptions(out=dataset, workers=1, **same)).already_done


def test_none_leaves_bos_out_with_any_tokenizer(write_jsonl, tmp_path):
    source = write_jsonl(["a text", "another"])
    for name, bos in (("with", None), ("without", NONE)):
        tokenize([source], TokenizeOptions(out=tmp_path / name, bos_token=bos, workers=1))
    with_bos, without = (read_as_megatron(tmp_path / name) for name in ("with", "without"))
    assert all(document[0] == START for document in with_bos)
    assert without == [document[1:] for document in with_bos]
    with pytest.raises(UserError, match=r"`bos_token` is '<\|im_start\|>' there and none here; to add"):
        tokenize([source], TokenizeOptions(out=tmp_path / "with", workers=1, bos_token=NONE))
    for name in ("tokenizer.json", "tokenizer_config.json"):  # which the one that ships has too
        (tmp_path / "without" / name).unlink()
    again = TokenizeOptions(out=tmp_path / "without", workers=1)
    assert tokenize([source], again).already_done
    assert not verify(tmp_path / "without").problems
    assert "bos_token" not in json.loads((tmp_path / "without" / "tokenizer_config.json").read_text())
    with pytest.raises(UserError, match=r"(?i)bos"):
        merge([tmp_path / "with", tmp_path / "without"], MergeOptions(out=tmp_path / "both"))


@pytest.mark.parametrize(
    ("config", "bos_id"),
    [
        ({"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, None),
        ({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, None),
        ({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, START),
    ],
)
def test_the_config_says_whether_there_is_bos(folder, config, bos_id):
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(folder).info.special_ids == (bos_id, EOS, PAD)
    assert load_tokenizer(folder, SpecialTokens(bos=NONE)).info.special_ids == (None, EOS, PAD)
    assert load_tokenizer(folder, SpecialTokens(bos="<|im_start|>")).info.bos_id == START
    assert ("no BOS" in repr(load_tokenizer(folder))) == (bos_id is None)


@pytest.mark.parametrize("content", [None, "{}", "[]", '{"chat_template": "x"}'])
def test_a_config_that_names_no_token_says_nothing_of_bos(folder, content):
    path = folder / "tokenizer_config.json"
    path.unlink() if content is None else path.write_text(content)
    others = {"eos": "<|im_end|>", "pad": "<|endoftext|>"}
    with pytest.raises(
        UserError,
        match=r"nothing says which token is BOS .*; pass `bos_token` TOKEN \(it has <\|endoftext\|>, <\|im_start\|>, "
        r"<\|im_end\|>\), or `bos_token` none to store texts without",
    ):
        load_tokenizer(folder, SpecialTokens(**others))
    assert load_tokenizer(folder, SpecialTokens(bos=NONE, **others)).info.special_ids == (None, EOS, PAD)


def test_there_must_be_eos_and_pad(folder):
    for name in ("eos", "pad"):
        config = {
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            f"{name}_token": None,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(
            UserError,
            match=rf"nothing says which token is {name.upper()} .*; pass `{name}_token` TOKEN \(it has <\|endoftext\|>",
        ):
            load_tokenizer(folder)
        with pytest.raises(
            UserError,
            match=rf"`{name}_token` none: there must be one, since {name.upper()} .*; pass `{name}_token` TOKEN",
        ):
            load_tokenizer(folder, SpecialTokens(**{name: NONE}))


def test_a_shard_of_another_dataset_is_noticed(dataset):
    path = dataset / f"{Manifest.read(dataset).shards[0].name}.bin"
    data = bytearray(path.read_bytes())
    data[-2:] = struct.pack("<H", 65)
    path.write_bytes(data)
    with pytest.raises(
        FormatError, match=r"ends with 65, where this dataset's tokenizer has no BOS and EOS 2, so it"
    ):
        ShardSet.open(dataset).shard(0)


# Windows


def test_concat_is_the_stream(shared_dataset, shared_folder):
    stream = list(itertools.chain(*expected_documents(shared_folder)))
    shards = ShardSet.open(shared_dataset)
    for seq_len in (1, 5, 16, len(stream) - 1):
        windows = open_windows(shards, layout="concat", seq_len=seq_len)
        batch = windows.fetch(np.arange(len(windows)))
        used = len(windows) * seq_len
        assert batch["input_ids"].ravel().tolist() == stream[:used]
        assert batch["targets"].ravel().tolist() == stream[1 : used + 1]
        assert windows.unused_tokens == len(stream) - 1 - used < seq_len


@pytest.mark.parametrize("pad", [PAD, EOS])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("seq_len", [2, 3, 9, 33, 200, 5000])
def test_pad_is_a_document_a_window(shared_dataset, shared_folder, seq_len, labels, pad):
    shards = with_pad(shared_dataset, pad)
    windows = open_windows(shards, layout="pad", seq_len=seq_len, labels=labels)
    width = seq_len if labels else seq_len + 1
    rows, learned = [], []
    for document in expected_documents(shared_folder):
        kept = document if len(document) <= width else [*document[: width - 1], EOS]
        padding = width - len(kept)
        rows.append(kept + [pad] * padding)
        learned.append(kept + [IGNORED] * padding)
    batch = windows.fetch(np.arange(len(windows)))
    assert batch["input_ids"].tolist() == [row[:seq_len] for row in rows]
    if labels:
        assert batch["labels"].tolist() == learned
    else:
        assert batch["targets"].tolist() == [row[1:] for row in learned]
    assert windows.padding == sum(
        max(0, seq_len - len(document)) for document in expected_documents(shared_folder)
    )


def with_pad(shared_dataset, pad):
    """The dataset with another token as PAD."""
    manifest = Manifest.read(shared_dataset)
    return ShardSet(shared_dataset, replace(manifest, tokenizer=replace(manifest.tokenizer, pad_id=pad)))


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("seq_len", [2, 3, 9, 33, 200])
@pytest.mark.parametrize(
    ("layout", "long_documents"),
    [("concat", "cut"), ("pad", "cut"), *(("pack", how) for how in LONG_DOCUMENTS)],
)
def test_documents_are_kept_apart_by_where_they_begin(
    shared_dataset, shared_folder, layout, long_documents, seq_len, labels
):
    windows = open_windows(
        ShardSet.open(shared_dataset),
        layout=layout,
        seq_len=seq_len,
        labels=labels,
        documents_apart=True,
        long_documents=long_documents,
    )
    documents = expected_documents(shared_folder)
    starts = np.cumsum([0, *map(len, documents)])
    present = [[False] * len(document) for document in documents]
    batch = {name: rows.tolist() for name, rows in windows.fetch(np.arange(len(windows))).items()}
    segments = windows.segments(np.arange(len(windows)))
    columns = (segments.rows, segments.columns, segments.lengths, segments.documents, segments.starts)
    for row, first, length, number, start in zip(*(one.tolist() for one in columns), strict=True):
        before = start - int(starts[number])
        tokens = documents[number][before : before + length]
        if layout != "concat" and long_documents == "cut":
            tokens[-1] = EOS
        for place, token in enumerate(tokens):
            column = first + place
            present[number][before + place] = True
            if column < seq_len:
                assert batch["input_ids"][row][column] == token
                assert batch["position_ids"][row][column] == place
                assert windows.document_ids(row)[column] == number
            # All are targets but the first token of a document, unless the model shifts and drops the first label itself.
            is_target = place > 0 or (labels and column == 0)
            if labels:
                assert batch["labels"][row][column] == (token if is_target else IGNORED)
            elif column:
                assert batch["targets"][row][column - 1] == (token if is_target else IGNORED)
    assert windows.unused_tokens == sum(one.count(False) for one in present)


@pytest.mark.parametrize("layout", ["concat", "pad", "pack"])
def test_every_token_is_located(shared_dataset, shared_folder, layout):
    shards = ShardSet.open(shared_dataset)
    windows = open_windows(shards, layout=layout, seq_len=6, long_documents="fragment")
    documents = expected_documents(shared_folder)
    stream = list(itertools.chain(*documents))
    owners = np.repeat(np.arange(len(documents)), [len(document) for document in documents]).tolist()
    for number in range(len(windows)):
        place = windows.locate(number)
        assert windows.window_of(*place) == number
        assert windows[number]["input_ids"][0] == stream[shards.token_at(*place)]
    for token in range(len(stream) - (windows.unused_tokens + 1) * (layout == "concat")):
        number = windows.window_of(*shards.name_and_offset(token))
        if layout == "pad":
            assert number == owners[token]
        else:
            assert stream[token] in np.concatenate(list(windows[number].values()))


def test_the_smallest_window_is_refused_by_what_a_document_has(shared_dataset):
    with pytest.raises(
        UserError, match="`seq_len` 1 is too short for layout pad: a token and EOS alone take 2"
    ):
        open_windows(ShardSet.open(shared_dataset), layout="pad", seq_len=1)
    with pytest.raises(UserError, match="`seq_len` 1: a window holds a token and EOS at least"):
        stats(ShardSet.open(shared_dataset), load_tokenizer(shared_dataset), [1])


def test_the_window_command_shows_it(shared_dataset, shared_folder):
    shown = json.loads(
        mm_data("window", shared_dataset, 1, "--seq-len", 8, "--layout", "pad", "--json").stdout
    )
    assert shown["input_ids"] == [*expected_documents(shared_folder)[1], *[PAD] * 6]
    assert shown["document_ids"] == [1, 1, *[-1] * 6]
    located = json.loads(
        mm_data(
            "locate", shared_dataset, "--seq-len", 8, "--position", 1, "--order", "sequential", "--json"
        ).stdout
    )
    assert (located["window"], located["offset"]) == (1, 8)


# Statistics


def test_the_statistics_leave_out_eos_alone(shared_dataset, shared_folder, tmp_path):
    shards, tokenizer = ShardSet.open(shared_dataset), load_tokenizer(shared_dataset)
    told = stats(shards, tokenizer, [16])
    documents = expected_documents(shared_folder)
    assert told.text.tokens == sum(map(len, documents)) - len(documents)
    assert told.text.characters == sum(len(text.strip()) for text in TEXTS)
    assert told.lengths.tokens.tolist() == sorted({len(document) for document in documents})
    write_page(tmp_path / "page.html", told.as_dict(), shards, tokenizer, num_windows=4)
    assert '"bos":null,"eos":2,"pad":0' in (tmp_path / "page.html").read_text()


def test_a_sample_is_decoded_without_eos(shared_dataset, monkeypatch):
    """As where a tokenizer does not say which bytes its tokens are."""
    shards, tokenizer = ShardSet.open(shared_dataset), load_tokenizer(shared_dataset)
    token_bytes = replace(token_bytes_of(tokenizer), is_exact=False)
    monkeypatch.setattr(statistics, "token_bytes_of", lambda _: token_bytes)
    assert statistics.count_text(shards, tokenizer).characters == sum(len(text.strip()) for text in TEXTS)


# Datasets of datasets, and other projects' files


def test_merged_and_shuffled_they_are_the_same_documents(dataset, folder, tmp_path):
    merge([dataset, dataset], MergeOptions(out=tmp_path / "both"))
    assert read_as_megatron(tmp_path / "both") == 2 * expected_documents(folder)
    shuffle(dataset, ShuffleOptions(out=tmp_path / "mixed", seed=3))
    mixed = read_as_megatron(tmp_path / "mixed")
    assert mixed != expected_documents(folder)
    assert sorted(mixed) == sorted(expected_documents(folder))
    assert Manifest.read(tmp_path / "mixed").tokenizer.bos_id is None


@pytest.mark.parametrize("one_file", [False, True])
@pytest.mark.parametrize("kind", [*FORMATS, *ALIASES])
def test_there_and_back_gives_the_same_documents(folder, write_jsonl, tmp_path, kind, one_file):
    texts = [text for text in TEXTS if text.strip() and not text.endswith("<|im_end|>")]
    inputs = [write_jsonl(texts[:9], "one.jsonl"), write_jsonl(texts[9:], "two.jsonl")]
    tokenize(inputs, TokenizeOptions(out=tmp_path / "data", tokenizer=folder, workers=1))
    there = convert(
        tmp_path / "data", ConvertOptions(out=tmp_path / "theirs", one_file=one_file), target_format=kind
    )
    assert there.divided == 0
    back = convert(
        tmp_path / "theirs",
        ConvertOptions(out=tmp_path / "back", tokenizer=folder),
        source_format="nanogpt" if kind == "nanogpt" else "auto",
    )
    assert read_as_megatron(tmp_path / "back") == expected_documents(folder, texts)
    assert (back.bos_added, back.eos_added, back.empty) == (0, 0, 0)
    assert Manifest.read(tmp_path / "back").tokenizer.bos_id is None


def test_streams_are_divided_by_eos(folder, write_jsonl, tmp_path):
    tokenize(
        [write_jsonl(["ab", "c<|im_end|>d"])],
        TokenizeOptions(out=tmp_path / "data", tokenizer=folder, workers=1),
    )
    (a, b, _), (c, _, d, _) = expected_documents(folder, ["ab", "c<|im_end|>d"])
    for kind in ("nanogpt", "llmc"):
        out = ConvertOptions(out=tmp_path / kind)
        assert convert(tmp_path / "data", out, target_format=kind).divided == 1
    ids = np.fromfile(tmp_path / "nanogpt" / "train.bin", "<u2").tolist()
    assert ids == [a, b, EOS, c, EOS, d, EOS]
    llmc = (tmp_path / "llmc" / "text-00000.bin").read_bytes()
    assert llmc == struct.pack("<3i1012x", 20240520, 1, 7) + struct.pack("<7H", EOS, a, b, EOS, c, EOS, d)


def test_what_comes_in_gets_eos_alone(folder, tmp_path, write_megatron):
    stem = write_megatron(tmp_path / "x", [[70, 71], [72, EOS], [EOS], [], [START, 73]])
    result = mm_data("convert", stem, "--tokenizer", folder, "--out", tmp_path / "data")
    assert read_as_megatron(tmp_path / "data") == [[70, 71, EOS], [72, EOS], [START, 73, EOS]]
    assert "2 documents came without EOS; added" in result.stdout
    assert "2 documents without any token but BOS and EOS" in result.stdout


# Conversations


def expected_conversation(folder, messages):
    """(ids, mask) of a conversation in ChatML: what the assistant says is learned, `<|im_end|>` and its line feed too."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids, mask = [], []
    for message in messages:
        opening = tokenizer.encode(f"<|im_start|>{message['role']}\n").ids
        rest = tokenizer.encode(f"{message['content']}<|im_end|>\n").ids
        ids += opening + rest
        mask += [0] * len(opening) + [int(message["role"] == "assistant")] * len(rest)
    return ids, mask


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_conversations_are_what_the_template_writes(folder, tmp_path, kind):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "normalizer": None}))  # line feeds are tokens of a conversation
    right, wrong = PLAIN, [*PLAIN[:-1], {"role": "assistant", "content": "Grass."}]
    record = {"messages": right} if kind == "sft" else {"chosen": right, "rejected": wrong}
    (tmp_path / "chats.jsonl").write_text(json.dumps(record) + "\n")
    tokenize(
        [tmp_path / "chats.jsonl"],
        TokenizeOptions(out=tmp_path / "data", tokenizer=folder, kind=kind, workers=1),
    )
    (shard,) = ShardSet.open(tmp_path / "data")
    sides = [
        expected_conversation(folder, messages)
        for messages in ((right,) if kind == "sft" else (right, wrong))
    ]
    assert shard.tokens.tolist() == list(itertools.chain(*(ids for ids, _ in sides)))
    if kind == "sft":
        assert shard.mask.tolist() == sides[0][1]
    assert Manifest.read(tmp_path / "data").tokenizer.bos_id is None
    windows = open_windows(ShardSet.open(tmp_path / "data"), layout="pad", seq_len=400)
    name = "" if kind == "sft" else "chosen_"
    ids = sides[0][0]
    assert windows[0][f"{name}input_ids"].tolist() == [*ids, *[PAD] * (400 - len(ids))]


def test_a_template_writes_no_bos_where_there_is_none(tmp_path):
    """`transformers` renders it so for a tokenizer without BOS, as the exported one of such a dataset is."""
    folder = make_tokenizer(tmp_path / "tok", "brackets")
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": PLAIN}) + "\n")
    texts = {}
    for name, bos in (("with", None), ("without", NONE)):
        out = tmp_path / name
        options = TokenizeOptions(out=out, tokenizer=folder, kind="sft", bos_token=bos, workers=1)
        tokenize([tmp_path / "chats.jsonl"], options)
        (shard,) = ShardSet.open(out)
        texts[name] = load_tokenizer(out).decode(shard.tokens.tolist())
        assert render_chat(chat_template_of(out), PLAIN) == texts[name]
        assert tokenize([tmp_path / "chats.jsonl"], replace(options, tokenizer=out)).already_done
    assert BRACKETS.startswith("{{- bos_token }}")
    assert texts["with"] == f"<|im_start|>{texts['without']}"
