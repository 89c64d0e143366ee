"""Records: what makes a document out of each form, and a record that makes none says why."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimind_data.errors import UserError
from minimind_data.inputs.discovery import source_of
from minimind_data.inputs.forms import form_of
from minimind_data.inputs.spec import RecordSpec
from minimind_data.inputs.splits import open_reader, plan_splits


def read(path, split_bytes=2**20, form="auto", **spec):
    """Return (texts, bad records, number of empty texts) of a file, and check what its readers tell of themselves."""
    spec = RecordSpec(**{"max_word_chars": 1000, **spec})
    texts, bad, empty, lines, num_bytes = [], [], 0, 0, 0
    (splits,) = plan_splits([source_of(str(path), form)], split_bytes, spec)
    for split in splits:
        reader = open_reader(split, spec)
        assert form_of(split.source, spec).place(split, 1) in (f"{path}:{lines + 1}", str(path))
        for block in reader.blocks():
            texts += block.texts
            bad += block.bad
            empty += block.empty_texts
            num_bytes += block.num_bytes
        assert form_of(split.source, spec).content(split) == (reader.begin, reader.end, reader.sha256)
        lines += reader.num_lines
    assert num_bytes <= sum(split.num_bytes for split in splits)
    return texts, bad, empty


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not JSON (unexpected end of data, column 13); mend or remove the line"),
        (b"hello", "not JSON"),
        (b"[1, 2]", 'the record is a list, not an object; write it as {"text": …}'),
        (b"5", "the record is a number, not an object"),
        (b"null", "the record is null, not an object"),
        (b'"a"', "the record is a string, not an object"),
        (b"true", "the record is true or false, not an object"),
        (
            b'{"content": "a", "id": 1}',
            "no field 'text' (its fields: content, id); name the field of the text with `field`",
        ),
        (b"{}", "no field 'text' (its fields: none at all)"),
        (b'{"text": 5}', "field 'text' is a number, not a string"),
        (b'{"text": null}', "field 'text' is null, not a string"),
        (b'{"text": ["a"]}', "field 'text' is a list, not a string"),
        (b'{"text": "\xff"}', "byte 11 of the line (0xff) is no UTF-8; convert the file to UTF-8"),
        # At column 11 it begins, at 17 it ends; which of them is said is orjson's affair.
        (b'{"text": "\\ud800"}', "a lone surrogate escape (column 1"),
        (b'{"text": "a\\udc00b"}', "), which is no character; remove it"),
        (b'{"text": "' + b"a" * 1001 + b'"}', "one word of 1,001 characters, the longest allowed has 1,000"),
        (b'{"text": "' + "好".encode() * 2000 + b'"}', "one word of 2,000 characters"),
        (b'{"text": "x' + b" " * 2000 + b'"}', "one word of 2,000 characters"),
        (b"[" * 5000, "not JSON that can be read (nested too deep); write it flatter"),
        (b'{"text": NaN}', "field 'text' is NaN, which is no number, not a string; name the field"),
        (
            b'{"text": -Infinity}',
            "field 'text' is Infinity, which is no number, not a string; name the field",
        ),
        (b'{"text": "a", "score": nan}', "not JSON"),
    ],
)
def test_a_bad_record_says_what_and_what_to_do(tmp_path, line, reason):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "also good"}\n')
    texts, bad, _ = read(path)
    assert texts == ["good", "also good"]
    assert [one.line for one in bad] == [3]
    assert reason in bad[0].reason
    assert ";" in bad[0].reason
    assert bad[0].data == line


def test_what_is_not_bad(tmp_path):
    path = tmp_path / "x.jsonl"
    long = "two words " * 500
    path.write_bytes(
        b"\xef\xbb\xbf" + b'{"text": "first"}\r\n  \n{"text": ""}\n{"id": 1, "text": "\\u4f60\\ud83d\\ude42\\u0000"}\n'
        + b'{"text": "' + long.encode() + b'"}\n{"text": "last, without newline"}'
    )  # fmt: skip
    texts, bad, empty = read(path)
    assert texts == ["first", "你🙂\x00", long, "last, without newline"]
    assert (bad, empty) == ([], 1)


@pytest.mark.parametrize(
    "field", [b'"s": NaN', b'"s": [Infinity, {"x": -Infinity}]', b'"s": "\\ud83d"', b'"\\udc00": 1']
)
def test_what_only_python_writes_costs_no_document_where_nothing_reads_it(tmp_path, field):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "two", ' + field + b'}\n{"text": "", ' + field + b"}\n")
    assert read(path) == (["one", "two"], [], 1)


@pytest.mark.parametrize("cut", ["{", '{"text": "half a te', '{"text": "好', '{"text": "好"'])
@pytest.mark.parametrize("split_bytes", [10, 2**20])
def test_a_file_that_ends_in_the_middle_of_a_line_may_be_a_download_that_was_cut_off(
    tmp_path, cut, split_bytes
):
    path = tmp_path / "x.jsonl"
    for data in {cut.encode(), cut.encode()[:-1] if cut.endswith("好") else cut.encode()}:
        path.write_bytes(b'{"text": "a"}\n' + data)
        texts, bad, _ = read(path, split_bytes)
        assert texts == ["a"]
        assert [one.reason for one in bad] == [
            "not JSON: the file ends in the middle of this line; is the download complete?"
        ]
        path.write_bytes(path.read_bytes() + b"\n")
        assert "download" not in read(path, split_bytes)[1][0].reason


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("x.json", b'[{"text":"a"},{"text":"b"}]', r"one JSON array, not one record a line; rewrite it, as with `jq"),
        ("x.json", b'[{"text":"a"},\n{"text":"b"}]', "one JSON array"),
        ("x.json", b"[\n" + b'{"text":"a"}\n]', "one JSON array"),
        ("x.jsonl", b'{"text": "a"}\r{"text": "b"}\r', r"a carriage return alone; convert it, as with `tr '\\r' '\\n'`"),
        ("x.jsonl", b'id,text\n1,"a, b"\n', "CSV, not one JSON object a line; write its rows"),
        ("x.jsonl", b"id\ttext\n1\ta\n", "CSV, not one JSON object a line"),
        ("x.csv", b"id,text\n1,a\n", "CSV, not one JSON object a line"),
        ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 16\n", "a Git LFS pointer, .* `git lfs pull`"),
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 16\n", "a Git LFS pointer"),
    ],
)  # fmt: skip
def test_files_that_hold_something_else_are_named(tmp_path, name, data, complaint):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=complaint):
        source_of(str(tmp_path / name))


@pytest.mark.parametrize("split_bytes", [10, 57, 2**20])
@pytest.mark.parametrize("block_bytes", [1, 5, 2**20])
def test_splits_and_blocks_do_not_show(tmp_path, split_bytes, block_bytes, monkeypatch):
    monkeypatch.setattr("minimind_data.inputs.lines._BLOCK_BYTES", block_bytes)
    path = tmp_path / "x.jsonl"
    wanted = [f"第 {i} text" * (i % 4) for i in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in wanted))
    texts, bad, empty = read(path, split_bytes)
    assert texts == [text for text in wanted if text]
    assert (bad, empty) == ([], 10)


@pytest.mark.parametrize("compress", [gzip.compress, lambda data: pa.compress(data, "zstd", asbytes=True)])
def test_a_compressed_file_reads_as_what_is_in_it(tmp_path, compress):
    data = b"".join(b'{"text": "number %d"}\r\n' % i for i in range(5000))
    path = tmp_path / "x.jsonl.gz"  # the content decides, not the name
    path.write_bytes(compress(data[:40_000]) + compress(data[40_000:]))  # members, as `cat a.gz b.gz` makes
    assert read(path, 1000)[0] == [f"number {i}" for i in range(5000)]
    path.write_bytes(compress(data)[:-20])
    with pytest.raises(UserError, match=r"x\.jsonl\.gz: damaged or cut off \(.*\); get it again"):
        read(path)


def test_nested_fields_and_templates(tmp_path):
    path = tmp_path / "x.jsonl"
    records = [
        {"q": "why?", "data": {"content": "inner", "deep": {"er": "深"}}},
        {"q": "how?", "data": {"content": "second", "deep": {}}, "data.content": "a name with a dot wins"},
        {"q": 5, "data": {"content": "third"}},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert read(path, field="data.content")[0] == ["inner", "a name with a dot wins", "third"]
    texts, bad, _ = read(path, field="data.deep.er")
    assert texts == ["深"]
    assert [one.reason for one in bad] == [
        "no field 'data.deep.er' (its fields: q, data, data.content); name the field of the text with `field`",
        "no field 'data.deep.er' (its fields: q, data); name the field of the text with `field`",
    ]
    texts, bad, _ = read(path, template="{{Q}} {q}\n{data.content}")
    assert texts == ["{Q} why?\ninner", "{Q} how?\na name with a dot wins"]
    assert bad[0].reason == "field 'q' is a number, not a string; mend the record or `template`"


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"template": "nothing"}, "names no field"),
        ({"template": "{a:>5}"}, "a field's name and nothing else"),
        ({"template": "{}"}, "a field's name and nothing else"),
        ({"template": "{a"}, "write literal braces doubled"),
        ({"template": "{a}", "field": "b"}, "exclude each other"),
        ({"separator": ""}, "`separator` must not be empty"),
        ({"max_word_chars": 0}, "`max_word_chars` must be at least 1"),
    ],
)
def test_impossible_specs_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        RecordSpec(**settings)


def test_chinese_in_another_encoding_is_known(tmp_path):
    path = tmp_path / "x.jsonl"
    line = '{"text": "今天天气很好，我们去公园。"}'
    for encoding in ("gbk", "gb18030", "gb2312"):
        path.write_bytes(line.encode(encoding))
        (bad,) = read(path)[1]
        assert bad.reason == (
            "byte 11 of the line (0xbd) is no UTF-8; convert the file to UTF-8, as with `iconv -f GB18030 -t UTF-8`"
        )
    for text in ("déjà vu, mais ça va", "naïve café", "Gruß aus Köln"):
        path.write_bytes(f'{{"text": "{text}"}}'.encode("latin-1"))
        (bad,) = read(path)[1]
        assert bad.reason.endswith("is no UTF-8; convert the file to UTF-8")


@pytest.mark.parametrize("split_bytes", [1, 7, 30, 2**20])
def test_text_is_cut_at_its_separator(tmp_path, split_bytes):
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo\n\nthree\n\n\n\n  \n\nfour \xff\n\nlast\n")
    texts, bad, empty = read(path, split_bytes, separator=r"\n\n")
    assert texts == ["one\ntwo", "three\n\n", "last\n"]
    assert [one.reason for one in bad] == ["byte 6 of the text (0xff) is no UTF-8; convert the file to UTF-8"]
    assert empty == 1
    path.write_text("a<|end|>b<|end|>\n<|end|>c")
    assert read(path, split_bytes, separator="<|end|>")[0] == ["a", "b", "c"]


def test_a_file_without_separator_is_one_document(tmp_path):
    spec = RecordSpec()
    sources = []
    for number, text in enumerate(["first\n", "second", " \n", "x" * 50, "third"]):
        (tmp_path / f"{number}.txt").write_text(text)
        sources.append(source_of(str(tmp_path / f"{number}.txt")))
    planned = plan_splits(sources, 60, spec)
    assert [[1 + len(split.more) for split in splits] for splits in planned] == [[3], [], [], [2], []]
    found = [
        (block.texts, block.empty_texts)
        for splits in planned
        for split in splits
        for block in open_reader(split, spec).blocks()
    ]
    assert found == [(["first\n", "second"], 1), (["x" * 50, "third"], 0)]
    assert form_of(planned[0][0].source, spec).place(planned[0][0], 2) == str(tmp_path / "1.txt")


@pytest.fixture
def parquet(tmp_path):
    path = tmp_path / "x.parquet"
    table = pa.table(
        {
            "id": list(range(100)),
            "text": [None if i == 41 else f"row {i}" * (i % 3) for i in range(100)],
            "data": [{"content": f"inner {i}", "n": i} for i in range(100)],
        }
    )
    pq.write_table(table, path, row_group_size=10)
    return path


@pytest.mark.parametrize("split_bytes", [1, 300, 2**20])
def test_parquet_rows(parquet, split_bytes):
    texts, bad, empty = read(parquet, split_bytes)
    assert texts == [f"row {i}" * (i % 3) for i in range(100) if i % 3 and i != 41]
    assert empty == 34
    assert bad[0].reason == "field 'text' is null, not a string; name the field of the text with `field`"
    assert read(parquet, split_bytes, field="data.content")[0] == [f"inner {i}" for i in range(100)]
    assert read(parquet, split_bytes, template="{data.content}/{data.content}")[0][7] == "inner 7/inner 7"


def test_row_groups_make_the_splits(parquet):
    spec = RecordSpec()
    (each,) = plan_splits([source_of(str(parquet))], 1, spec)
    assert [(split.start, split.stop) for split in each] == [(i, i + 1) for i in range(10)]
    (one,) = plan_splits([source_of(str(parquet))], 2**20, spec)
    assert [(split.start, split.stop) for split in one] == [(0, 10)]
    assert sum(split.num_bytes for split in each) == one[0].num_bytes
    assert form_of(each[3].source, spec).place(each[3], 2) == f"{parquet}:32"


@pytest.mark.parametrize(
    ("field", "complaint"),
    [
        ("nope", r"no column 'nope' \(its columns: id, text, data\); name the column"),
        ("id", "column 'id' holds int64, not strings"),
        ("data", "column 'data' holds struct<"),
        ("data.nope", r"no column 'data.nope' \(data is struct<"),
    ],
)
def test_a_column_that_is_none_is_named(parquet, field, complaint):
    with pytest.raises(UserError, match=complaint):
        read(parquet, field=field)


def test_a_damaged_parquet_file_is_named(parquet):
    parquet.write_bytes(parquet.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"x\.parquet: damaged or cut off"):
        read(parquet)


def test_parquet_strings_of_every_arrow_kind(tmp_path):
    texts = ["一", "two", "一"]
    for number, kind in enumerate([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"text": pa.array(texts, pa.string()).cast(kind)}), path)
        assert read(path)[0] == texts
    path = tmp_path / "broken.parquet"
    pq.write_table(pa.table({"text": pa.array([b"fine", b"\xff\xfe"], pa.binary()).view(pa.string())}), path)
    texts, bad, _ = read(path)
    assert texts == ["fine"]
    assert bad[0].reason.startswith("field 'text' is bytes that are no UTF-8, not a string")


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary())])
def test_text_that_parquet_stores_as_bytes(tmp_path, kind):
    values = [b"one", "二".encode(), b"\xff", None]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": pa.array(values, pa.binary()).cast(kind)}), path)
    texts, bad, _ = read(path)
    assert texts == ["one", "二"]
    assert [one.reason.partition(";")[0] for one in bad] == [
        "field 'text' is bytes that are no UTF-8, not a string",
        "field 'text' is null, not a string",
    ]


def test_two_columns_of_one_name(tmp_path):
    texts, ids = pa.array(["a"]), pa.array([1])
    pq.write_table(pa.Table.from_arrays([texts, texts, ids], ["text", "text", "id"]), tmp_path / "x.parquet")
    with pytest.raises(
        UserError, match=r"x\.parquet: two columns or fields of the name 'text'; rename or drop one"
    ):
        read(tmp_path / "x.parquet")
    inner = pa.StructArray.from_arrays([texts, texts], ["a", "a"])
    pq.write_table(pa.table({"text": texts, "data": inner}), tmp_path / "y.parquet")
    with pytest.raises(UserError, match="of the name 'a'"):
        read(tmp_path / "y.parquet", field="data.a")
    assert read(tmp_path / "y.parquet")[0] == ["a"]
    pq.write_table(pa.Table.from_arrays([texts, ids, ids], ["text", "id", "id"]), tmp_path / "z.parquet")
    assert read(tmp_path / "z.parquet")[0] == ["a"]
