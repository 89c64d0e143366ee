"""Pieces between delimiters: splits hold every one once, however the file is cut and in whatever blocks it is read."""

import gzip
import io
import itertools
import subprocess
import sys
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_data.files import sha256_of_bytes
from minimind_data.inputs import held_record, lines
from minimind_data.inputs.base import Split
from minimind_data.inputs.forms import form_of
from minimind_data.inputs.lines import Delimiter, LineReader, border
from minimind_data.inputs.sources import Source
from minimind_data.inputs.spec import RecordSpec


def pieces_of(data: bytes, delimiter: bytes) -> list[bytes]:
    """Cut by the definition: at every occurrence that no later occurrence overlaps."""
    starts = [i for i in range(len(data)) if data.startswith(delimiter, i)]
    counted = [i for i in starts if not any(i < j < i + len(delimiter) for j in starts)]
    ends = [0, *(i + len(delimiter) for i in counted), len(data)]
    return [
        data[start:stop].removesuffix(delimiter) if stop in ends[1:-1] else data[start:stop]
        for start, stop in itertools.pairwise(dict.fromkeys(ends))
    ]


@settings(deadline=None, max_examples=400)
@given(
    data=st.lists(st.sampled_from([b"\n", b"a", b"-", b"ab", b"\xe5\xa5\xbd"]), min_size=1, max_size=60).map(
        b"".join
    ),
    delimiter=st.sampled_from([b"\n", b"\n\n", b"ab", b"ab-", b"aba", b"-a-", b"\n-\n"]),
    size=st.integers(1, 60),
    block=st.sampled_from([1, 2, 7, 30, 2**20]),
)
def test_splits_hold_every_piece_once_and_in_order(tmp_path_factory, data, delimiter, size, block):
    path = tmp_path_factory.mktemp("lines") / "x"
    path.write_bytes(data)
    source = Source(name="x", location=str(path), form="text")
    ends = Delimiter(delimiter)
    borders = [*range(0, len(data), size), len(data)]
    readers = [LineReader(source, start, stop, ends) for start, stop in itertools.pairwise(borders)]
    with patch.object(lines, "_BLOCK_BYTES", block):
        found = [piece for reader in readers for lines in reader.lines() for piece in lines]
        for reader, (start, stop) in zip(readers, itertools.pairwise(borders), strict=True):
            with path.open("rb") as file:
                begin = border(file, ends, start, stop)
                assert begin == reader.begin
                assert reader.end == (stop if begin == stop else border(file, ends, stop))
    assert found == pieces_of(data, delimiter)
    assert sum(reader.num_lines for reader in readers) == len(found)
    end = 0
    for reader in readers:
        assert reader.begin in (end, reader.end)
        end = max(end, reader.end)
        assert reader.sha256 == sha256_of_bytes(data[reader.begin : reader.end])
    assert end == len(data)


@pytest.mark.parametrize("block", [1, 2, 3, 2**20])
@pytest.mark.parametrize("delimiter", [b"-", b"a-", b"--", b"-a-", b"a--"])
def test_a_border_is_where_the_first_line_from_there_begins(delimiter, block):
    """All texts of two letters, so that a delimiter ends at, before and behind every border, block and end."""
    ends = Delimiter(delimiter)
    with patch.object(lines, "_BLOCK_BYTES", block):
        for length in range(8):
            for letters in itertools.product(b"-a", repeat=length):
                data = bytes(letters)
                begins = [0, *itertools.accumulate(map(len, split_keeping(data, delimiter)))]
                for at, stop in itertools.combinations_with_replacement(range(length + 1), 2):
                    expected = next((begin for begin in begins if begin >= at), length)
                    assert border(io.BytesIO(data), ends, at, stop) == min(expected, stop), (data, at, stop)
                    assert border(io.BytesIO(data), ends, at) == expected, (data, at)


@pytest.mark.parametrize(
    "data", [b"aabaabaa", b"aabaaabaa", b"aabaaabab", b"-aabaaabaabaa-", b"aabaaabaaabaa"]
)
def test_a_delimiter_that_overlaps_itself_in_two_ways_is_looked_at_as_far_as_the_longer_one(data):
    """A delimiter of which four bytes may be the beginning of the next, or two of them."""
    ends = Delimiter(b"aabaa")
    begins = [0, *itertools.accumulate(map(len, split_keeping(data, b"aabaa")))]
    for block in range(1, 5):
        with patch.object(lines, "_BLOCK_BYTES", block):
            for at in range(len(data) + 1):
                expected = next((begin for begin in begins if begin >= at), len(data))
                assert border(io.BytesIO(data), ends, at) == expected, (block, at)


@pytest.mark.parametrize("delimiter", [b"-", b"a-", b"--", b"-a-"])
def test_the_next_and_the_last_end_of_a_line_are_found_or_minus_one(delimiter):
    ends = Delimiter(delimiter)
    for length in range(7):
        for letters in itertools.product(b"-a", repeat=length):
            data = bytes(letters)
            borders = [*itertools.accumulate(map(len, split_keeping(data, delimiter)))]
            borders = [at for at in borders if at < length or data.endswith(delimiter)]
            for place in range(length + 1):
                following = [at for at in borders if at - len(delimiter) >= place]
                assert ends.first_end(data, place) == (following[0] if following else -1), (data, place)
                before = [at for at in borders if at <= place]
                assert ends.last_end(data, place) == (before[-1] if before else -1), (data, place)


def split_keeping(data, delimiter):
    """The lines of a text, each with the delimiter that ends it."""
    starts = [i for i in range(len(data)) if data.startswith(delimiter, i)]
    counted = [i for i in starts if not any(i < j < i + len(delimiter) for j in starts)]
    begins = [0, *(i + len(delimiter) for i in counted)]
    return [data[start:stop] for start, stop in itertools.pairwise(begins)]


class Counting(io.BytesIO):
    """A file that counts the bytes which are read."""

    num_read = 0

    def read(self, size=-1):
        data = super().read(size)
        self.num_read += len(data)
        return data


def test_a_line_that_fills_many_splits_is_not_read_through_by_each(monkeypatch):
    monkeypatch.setattr(lines, "_BLOCK_BYTES", 16)
    file = Counting(b"x" * 10_000 + b"\n")
    assert border(file, lines.LINE_FEED, 1000, 1100) == 1100
    assert file.num_read <= 101
    assert border(file, lines.LINE_FEED, 10_001, 10_100) == 10_001


@pytest.mark.parametrize("stop", [None, 10_000])
def test_a_border_is_looked_for_a_block_at_a_time(monkeypatch, stop):
    monkeypatch.setattr(lines, "_BLOCK_BYTES", 16)
    for line_end in range(1001, 1040):
        file = Counting(b"x" * (line_end - 1) + b"\n" + b"x" * 20_000)
        assert border(file, lines.LINE_FEED, 1000, stop) == line_end
        assert file.num_read == -(-(line_end - 999) // 16) * 16, "no block behind the one that has the end"

    class Watched(Delimiter):
        most = 0

        def first_end(self, data, start):
            self.most = max(self.most, len(data))
            return super().first_end(data, start)

    for delimiter in (b"\n", b"-a-", b"<end>"):
        ends = Watched(delimiter)
        assert border(io.BytesIO(b"x" * 9000 + delimiter + b"x" * 2000), ends, 1000, stop) == 9000 + len(
            delimiter
        )
        assert ends.most <= 16 + 2 * len(delimiter), "what is behind is not kept"


@pytest.mark.parametrize("delimiter", [b"\n", b"\n\n"])
def test_a_line_beyond_reason_is_a_bad_record_with_its_number(tmp_path, monkeypatch, delimiter):
    monkeypatch.setattr(lines, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr(lines, "_LONG_LINE_BYTES", 4000)
    monkeypatch.setattr(held_record, "MAX_RECORD_BYTES", 2**20)
    path = tmp_path / "x.txt"
    long, kept = b"x" * 1_800_000, b"y" * 1_000_000
    pieces = [*[b"short"] * 300, long, b"short", kept, long, b"last"]
    data = delimiter.join(pieces)
    path.write_bytes(data)
    source = Source(name="x.txt", location=str(path), form="text")
    spec = RecordSpec(separator=delimiter.decode())
    for start in (0, 1500):
        split = Split(source=source, start=start, stop=len(data), num_bytes=len(data) - start)
        reader = form_of(source, spec).reader(split)
        blocks = list(reader.blocks())
        texts = [text.encode() for block in blocks for text in block.texts]
        first = data[: reader.begin].count(b"short")
        assert texts == [piece for piece in pieces if piece is not long][first:]
        bad = [record for block in blocks for record in block.bad]
        assert [form_of(source, spec).place(split, one.line) for one in bad] == ["x.txt:301", "x.txt:304"]
        assert all(one.reason.startswith("a record of over 1 MiB, too long") for one in bad)
        assert all(one.data == b"x" * 1000 for one in bad)
        assert (reader.end, reader.sha256) == (len(data), sha256_of_bytes(data[reader.begin :]))


BOMB = """
import resource, sys
from minimind_data.inputs import held_record
from minimind_data.inputs.discovery import source_of
from minimind_data.inputs.forms import form_of
from minimind_data.inputs.spec import RecordSpec

import pyarrow
held_record.MAX_RECORD_BYTES = 2**26
source = source_of(sys.argv[1])
form = form_of(source, RecordSpec())
split = form.splits([source], 2**26)[0][0]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
blocks = list(form.reader(split).blocks())
print([text for block in blocks for text in block.texts], [one.line for block in blocks for one in block.bad])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize(("name", "expected"), [("x.jsonl.gz", "['a', 'b'] [2]"), ("x.txt.gz", "[] [1]")])
def test_a_bomb_takes_little_memory(tmp_path, name, expected):
    """Half a gigabyte in half a megabyte; the limit is 64 MiB here."""
    path = tmp_path / name
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "a"}\n{"text": "')
        for _ in range(512):
            file.write(b"z" * 2**20)
        file.write(b'"}\n{"text": "b"}\n')
    child = subprocess.run([sys.executable, "-c", BOMB, path], capture_output=True, text=True, check=True)
    result, peak = child.stdout.splitlines()
    assert result == expected
    assert int(peak) < 80
