"""Conversations and pairs in Parquet: the bytes that the same records give as JSON lines, and bad rows by their number."""

import json
import shutil
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.dataset.format import Manifest
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.dataset.verification import verify
from minimind_data.errors import UserError
from minimind_data.options import options_from

TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "required": ["place"]}}},
    {"type": "function", "function": {"name": "time", "description": "现在几点"}},
]  # fmt: skip
SFT = [
    {"messages": [{"role": "user", "content": f"第{number}题 <|im_end|>\n"}, {"role": "assistant", "content": f"答{number}"}]}
    for number in range(40)
] + [
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "hm"}]},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q", "name": "zoe"},
                  {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "weather", "arguments": {"place": "北京"}}},
                                                       {"id": "2", "function": {"name": "time", "arguments": {}}}]},
                  {"role": "tool", "content": "1 < 2", "tool_call_id": "1"}, {"role": "assistant", "content": "a"}],
     "tools": TOOLS},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "tools": []},
]  # fmt: skip
SHAREGPT = [
    {"conversations": [{"from": "human", "value": f"{number}?"}, {"from": "gpt", "value": "a"}],
     **({"system": "s"} if number % 3 else {})}
    for number in range(20)
]  # fmt: skip
PARTS = [
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": f"b{number}"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "c"}]}]}
    for number in range(20)
]  # fmt: skip
SIDES = [
    {"chosen": [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": "yes"}],
     "rejected": [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": "no", "reasoning_content": "hm"}]}
    for number in range(30)
]  # fmt: skip
ALPACA = [
    {"instruction": f"{number}?", "input": "i" * (number % 2), "output": "a", "system": "s"}
    for number in range(30)
]
COMPLETIONS = [{"prompt": f"{number}?", "completion": "a"} for number in range(30)]
QUESTIONS = [
    {"system": "s", "question": f"{number}?", "chosen": "yes", "rejected": "no"} for number in range(30)
]
ONE_MESSAGE = [
    {"conversations": [{"from": "human", "value": f"{number}?"}],
     "chosen": {"from": "gpt", "value": "yes"}, "rejected": {"from": "gpt", "value": "no"}}
    for number in range(30)
]  # fmt: skip
IN_STRINGS = [{"conversations": json.dumps(record["messages"])} for record in SFT]
ANSWERS = [{"prompt": f"{number}?", "chosen": "yes", "rejected": "no"} for number in range(30)]


def write_jsonl(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return path


def write_parquet(path: Path, records) -> Path:
    names = dict.fromkeys(name for record in records for name in record)
    columns = {name: [record.get(name) for record in records] for name in names}
    pq.write_table(pa.table(columns), path, row_group_size=7)
    return path


def without_nulls(value):
    """Take away what Arrow filled its structs with. The fields of a struct stay in the order of its type."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def options(out: Path, kind="sft", **changes) -> TokenizeOptions:
    return options_from(
        TokenizeOptions, {"out": out, "kind": kind, "workers": 1, "split_bytes": 1024, **changes}
    )


def tokens_of(folder: Path) -> list[bytes]:
    """What a dataset holds, wherever one shard ends and the next begins."""
    shards = list(ShardSet.open(folder))
    parts = [(shard.tokens.tobytes(), shard.mask.tobytes(), shard.lengths.tobytes()) for shard in shards]
    return [b"".join(part) for part in zip(*parts, strict=True)]


def arrow_json(records):
    """Return a table in which each message is JSON in Arrow's type for it, as `datasets` writes what fits no struct."""
    columns = {}
    for name in records[0]:
        texts = [[orjson.dumps(one).decode() for one in record[name]] for record in records]
        flat = pa.array([text for row in texts for text in row])
        storage = pa.ExtensionArray.from_storage(pa.json_(), flat)
        offsets = pa.array([sum(map(len, texts[:place])) for place in range(len(texts) + 1)], pa.int32())
        columns[name] = pa.ListArray.from_arrays(offsets, storage)
    return pa.table(columns)


@pytest.mark.parametrize(
    ("kind", "records"),
    [
        ("sft", SFT),
        ("sft", SHAREGPT),
        ("sft", PARTS),
        ("sft", ALPACA),
        ("sft", COMPLETIONS),
        ("sft", IN_STRINGS),
        ("dpo", SIDES),
        ("dpo", ANSWERS),
        ("dpo", QUESTIONS),
        ("dpo", ONE_MESSAGE),
    ],
    ids=[
        "messages",
        "ShareGPT",
        "parts",
        "Alpaca",
        "completions",
        "strings",
        "sides",
        "answers",
        "questions",
        "message",
    ],
)
def test_parquet_gives_what_the_same_json_lines_give(tmp_path, kind, records):
    table = write_parquet(tmp_path / "x.parquet", records)
    padded = pq.read_table(table).to_pylist()
    if records is SFT:
        absent = dict.fromkeys(("name", "reasoning_content", "tool_call_id", "tool_calls"))
        assert padded[0]["messages"][0] == {**absent, **SFT[0]["messages"][0]}
    lines = write_jsonl(tmp_path / "x.jsonl", without_nulls(padded))
    assert without_nulls(padded) == records
    one = tokenize([lines], options(tmp_path / "lines", kind))
    other = tokenize([table], options(tmp_path / "parquet", kind))
    assert len(other.manifest.shards) > (records is SFT)
    assert tokens_of(tmp_path / "parquet") == tokens_of(tmp_path / "lines")
    assert one.manifest.num_documents == other.manifest.num_documents == len(records)
    assert not verify(tmp_path / "parquet").problems


def test_json_in_arrows_type_for_it_gives_what_json_lines_give(tmp_path):
    records = [{"messages": record["messages"], "tools": record.get("tools", [])} for record in SFT]
    tokenize([write_jsonl(tmp_path / "x.jsonl", records)], options(tmp_path / "lines"))
    pq.write_table(arrow_json(records), tmp_path / "x.parquet")
    tokenize([tmp_path / "x.parquet"], options(tmp_path / "parquet"))
    assert tokens_of(tmp_path / "parquet") == tokens_of(tmp_path / "lines")


def test_a_dataset_that_hugging_face_wrote(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    for name, mixed in (("structs", {}), ("json", {"on_mixed_types": "use_json"})):
        made = datasets.Dataset.from_list(SFT, **mixed)
        made.to_parquet(tmp_path / f"{name}.parquet")
        lines = write_jsonl(tmp_path / f"{name}.jsonl", without_nulls(made.to_list()))
        tokenize([lines], options(tmp_path / f"{name}-lines"))
        tokenize([tmp_path / f"{name}.parquet"], options(tmp_path / name))
        assert tokens_of(tmp_path / name) == tokens_of(tmp_path / f"{name}-lines")
    assert pq.read_schema(tmp_path / "json.parquet").field("messages").type.value_type == pa.json_()


@pytest.mark.parametrize(
    ("text", "make_list"),
    [(pa.large_string(), pa.list_), (pa.dictionary(pa.int32(), pa.string()), pa.large_list)],
)
def test_every_arrow_kind_of_lists_and_strings(tmp_path, text, make_list):
    message = pa.struct([("role", text), ("content", text), ("meta", pa.map_(pa.string(), pa.int64()))])
    records = [
        {"messages": [{**one, "meta": [("a", 1)]} for one in record["messages"]]} for record in SFT[:40]
    ]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(records, pa.schema([("messages", make_list(message))])), path)
    tokenize([path], options(tmp_path / "parquet"))
    tokenize([write_jsonl(tmp_path / "x.jsonl", SFT[:40])], options(tmp_path / "lines"))
    assert tokens_of(tmp_path / "parquet") == tokens_of(tmp_path / "lines")


GOOD = SFT[0]["messages"]
BAD = [
    ([{"role": "user", "content": "q"}], "messages has no turn of the assistant's"),
    ([{"role": "cook", "content": "soup"}], 'message 1 of messages has the role "cook"'),
    ([{"role": "user"}, GOOD[1]], "message 1 of messages, the user's, has no content"),
    ([], "messages is an empty list"),
    (None, "messages is null, not a list"),
]


@pytest.mark.parametrize(("messages", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_bad_row_is_named_by_its_number_and_can_be_set_aside(tmp_path, messages, reason):
    rows = [{"messages": GOOD}] * 9 + [{"messages": messages}] + [{"messages": GOOD}] * 4
    source = write_parquet(tmp_path / "bad.parquet", rows)
    with pytest.raises(UserError, match=r"bad\.parquet:10: ") as caught:
        tokenize([source], options(tmp_path / "out"))
    assert reason in str(caught.value)
    summary = tokenize([source], options(tmp_path / "out", on_bad_record="set-aside"))
    assert (summary.manifest.num_documents, summary.manifest.set_aside) == (13, 1)
    told = json.loads((tmp_path / "out" / "set-aside.jsonl").read_text("utf-8"))
    padded = messages and [{"role": None, "content": None, **one} for one in messages]
    assert (told["line"], json.loads(told["data"])) == (10, {"messages": padded})


def test_what_json_has_no_form_for_is_a_bad_row(tmp_path):
    texts = pa.array([b"q", b"a", b"q\xff", b"a", b"q", b"a"], pa.binary()).view(pa.string())
    roles = pa.array(["user", "assistant"] * 3)
    when = pa.array([None] * 5 + [7], pa.timestamp("s"))
    messages = pa.StructArray.from_arrays([roles, texts, when], ["role", "content", "when"])
    table = pa.table({"messages": pa.ListArray.from_arrays(pa.array([0, 2, 4, 6], pa.int32()), messages)})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet:2: content holds bytes that are no UTF-8"):
        tokenize([tmp_path / "x.parquet"], options(tmp_path / "out"))
    summary = tokenize([tmp_path / "x.parquet"], options(tmp_path / "out", on_bad_record="set-aside"))
    assert (summary.manifest.num_documents, summary.manifest.set_aside) == (1, 2)
    reasons = [
        json.loads(line)["reason"]
        for line in (tmp_path / "out" / "set-aside.jsonl").read_text().split("\n")[:-1]
    ]
    assert reasons[1].startswith(
        "when holds 1970-01-01 00:00:07 of type timestamp[ms], which JSON has no form for"
    )
    broken = pa.ExtensionArray.from_storage(pa.json_(), pa.array(["[1", "{}"]))
    pq.write_table(pa.table({"messages": broken}), tmp_path / "y.parquet")
    with pytest.raises(UserError, match=r"y\.parquet:1: messages holds what is no JSON"):
        tokenize([tmp_path / "y.parquet"], options(tmp_path / "out2"))


@pytest.mark.parametrize(
    ("kind", "table", "reason"),
    [
        ("sft", {"text": ["a"]}, "no column 'conversations' or 'messages' (its columns: text)"),
        ("sft", {"messages": ["a"]}, ":1: messages is a string, not a list; write a list of messages"),
        ("sft", {"messages": [1]}, "column 'messages' holds int64, not lists of messages; write each"),
        ("dpo", {"chosen": ["a"]}, "no column 'rejected' (its columns: chosen)"),
        ("dpo", {"chosen": ["a"], "rejected": [1]}, "column 'rejected' holds int64"),
    ],
)
def test_a_column_that_is_missing_or_of_another_type_is_named(tmp_path, kind, table, reason):
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet:") as caught:
        tokenize([tmp_path / "x.parquet"], options(tmp_path / "out", kind))
    assert reason in str(caught.value)


def test_a_changed_file_makes_its_changed_splits_alone(tmp_path):
    source = write_parquet(tmp_path / "x.parquet", SFT)
    first = tokenize([source], options(tmp_path / "out"))
    assert tokenize([source], options(tmp_path / "out")).already_done
    changed = [*SFT[:-1], {**SFT[-1], "messages": GOOD}]
    write_parquet(source, changed)
    second = tokenize([source], options(tmp_path / "out"))
    assert second.kept_shards == len(first.manifest.shards) - 1 > 3
    lines = write_jsonl(tmp_path / "x.jsonl", without_nulls(pq.read_table(source).to_pylist()))
    tokenize([lines], options(tmp_path / "lines"))
    assert tokens_of(tmp_path / "out") == tokens_of(tmp_path / "lines")
    shutil.rmtree(tmp_path / "out")
    tokenize([source], options(tmp_path / "out", workers=4, backend="tokenizers"))
    assert Manifest.read(tmp_path / "out") == second.manifest


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_json_lines_give_the_same(tmp_path, suffix):
    lines = write_jsonl(tmp_path / "x.jsonl", SFT)
    codec = {".gz": "gzip", ".zst": "zstd"}[suffix]
    with pa.CompressedOutputStream(str(tmp_path / f"y.jsonl{suffix}"), codec) as file:
        file.write(lines.read_bytes())
    tokenize([lines], options(tmp_path / "lines"))
    tokenize([tmp_path / f"y.jsonl{suffix}"], options(tmp_path / "packed"))
    assert tokens_of(tmp_path / "packed") == tokens_of(tmp_path / "lines")


def test_a_number_that_is_none_costs_no_row_where_nothing_reads_it(tmp_path):
    messages = [
        {"role": "user", "content": "q", "score": float("nan")},
        {"role": "assistant", "content": "a", "score": 1.0},
    ]
    write_parquet(tmp_path / "x.parquet", [{"messages": messages, "id": 1}])
    manifest = tokenize([tmp_path / "x.parquet"], options(tmp_path / "out")).manifest
    assert manifest.unread == {"messages[].score": 2, "id": 1}
    binary = pa.array([json.dumps(GOOD).encode()], pa.binary())
    pq.write_table(pa.table({"messages": binary}), tmp_path / "y.parquet")
    assert tokenize([tmp_path / "y.parquet"], options(tmp_path / "y")).manifest.num_documents == 1


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_two_columns_of_one_name_are_refused(tmp_path, kind):
    names = {"sft": ["messages", "messages"], "dpo": ["chosen", "rejected", "rejected"]}[kind]
    pq.write_table(pa.Table.from_arrays([pa.array([GOOD])] * len(names), names), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=f"two columns or fields of the name '{names[-1]}'"):
        tokenize([tmp_path / "x.parquet"], options(tmp_path / "out", kind))
