"""Records: splits hold every line once, and a line that makes no document says why."""

import io
import os
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_data import records
from minimind_data.errors import UserError
from minimind_data.files import sha256_of
from minimind_data.records import LineReader, count_lines, line_range, plan_splits, read_blocks


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
    block=st.sampled_from([1, 2, 7, 30, 2**20]),
    last=st.booleans(),
)
def test_splits_hold_every_line_once_and_in_order(tmp_path_factory, lines, size, block, last):
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    data = b"\n".join(lines) + (b"\n" if last else b"")
    if not data:
        return
    path.write_bytes(data)
    splits = plan_splits(path, size)
    readers = [LineReader(split) for split in splits]
    with patch.object(records, "_BLOCK_BYTES", block):
        found = [line for reader in readers for lines in reader for line in lines]
        assert [line_range(split) for split in splits] == [(reader.begin, reader.end) for reader in readers]
    assert found == data.removesuffix(b"\n").split(b"\n")
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


def test_a_line_that_fills_many_splits_is_not_read_through_by_each(monkeypatch):
    class Counting(io.BytesIO):
        num_read = 0

        def read(self, size=-1):
            data = super().read(size)
            self.num_read += len(data)
            return data

    monkeypatch.setattr(records, "_BLOCK_BYTES", 16)
    file = Counting(b"x" * 10_000 + b"\n")
    assert records._line_border(file, 1000, 1100) == 1100
    assert file.num_read <= 100
    assert records._line_border(file, 10_001, 10_100) == 10_001


def test_a_line_beyond_reason_is_refused_with_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 2**20)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 3 + b"[" + b"1," * 600_000 + b"1]\n")
    with pytest.raises(UserError, match=r"x\.jsonl:4: a line of over 1 MiB; write one record a line"):
        read(path)


def test_a_name_that_a_manifest_cannot_hold_is_refused(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    path.write_bytes(b'{"text": "a"}\n')
    with pytest.raises(
        UserError, match="the name is no UTF-8, so a manifest cannot hold it; rename the file"
    ):
        plan_splits(path, 100)


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
