"""Records: splits hold every line once, and a line that makes no document says why."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_data.errors import UserError
from minimind_data.files import sha256_of
from minimind_data.records import LineReader, count_lines, plan_splits, read_blocks


def read(path, split_bytes=2**20, field="text", max_word_chars=1000):
    texts, bad, empty = [], [], 0
    for split in plan_splits(path, split_bytes):
        reader = LineReader(split)
        for block in read_blocks(reader, field=field, max_word_chars=max_word_chars):
            texts += block.texts
            bad += block.bad
            empty += block.empty_texts
    return texts, bad, empty


@settings(deadline=None, max_examples=150)
@given(
    lines=st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")), min_size=1),
    size=st.integers(1, 60),
    last=st.booleans(),
)
def test_splits_hold_every_line_once_and_in_order(tmp_path_factory, lines, size, last):
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    data = b"\n".join(lines) + (b"\n" if last else b"")
    if not data:
        return
    path.write_bytes(data)
    readers = [LineReader(split) for split in plan_splits(path, size)]
    found = [line for reader in readers for block in reader for line in block]
    assert found == [line + b"\n" for line in data.split(b"\n")[:-1]] + list(
        filter(None, data.split(b"\n")[-1:])
    )
    assert sum(reader.num_lines for reader in readers) == len(found)
    begin = 0
    for reader in readers:
        assert reader.begin in (begin, reader.end)
        begin = max(begin, reader.end)
        assert reader.sha256 == sha256_of(path, reader.begin, reader.end)
        assert count_lines(path, reader.begin) == data[: reader.begin].count(b"\n")
    assert begin == len(data)


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
            "no field 'text' (its fields: content, id); name the field of the text with --field",
        ),
        (b"{}", "no field 'text' (its fields: none at all)"),
        (b'{"text": 5}', "field 'text' is a number, not a string"),
        (b'{"text": null}', "field 'text' is null, not a string"),
        (b'{"text": ["a"]}', "field 'text' is a list, not a string"),
        (b'{"text": "\xff"}', "byte 11 of the line (0xff) is no UTF-8; convert the file to UTF-8"),
        (b'{"text": "\\ud800"}', "a lone surrogate escape (column 11), which is no character; remove it"),
        (b'{"text": "a\\udc00b"}', "a lone surrogate escape"),
        (b'{"text": "' + b"a" * 1001 + b'"}', "one word of 1,001 characters, the longest allowed has 1,000"),
        (b'{"text": "' + "好".encode() * 2000 + b'"}', "one word of 2,000 characters"),
        (b'{"text": "x' + b" " * 2000 + b'"}', "one word of 2,000 characters"),
        (b"[" * 5000, "not JSON"),
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


def test_inputs_that_are_none(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    os.mkfifo(tmp_path / "pipe")
    for name, complaint in (
        ("pipe", "a pipe or a device"),
        ("nope.jsonl", "no such file"),
        ("empty.jsonl", "the file is empty"),
        (".", "a folder"),
    ):
        with pytest.raises(UserError, match=complaint):
            plan_splits(tmp_path / name, 100)
