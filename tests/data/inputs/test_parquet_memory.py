"""Parquet files whose rows are far larger than what is stored of them: memory, and the rows and digests, which do not depend on it."""

import random
import subprocess
import sys

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimind_data.errors import UserError
from minimind_data.files import sha256_of_bytes
from minimind_data.inputs import held_record, parquet, parquet_pages
from minimind_data.inputs.discovery import source_of
from minimind_data.inputs.forms import form_of
from minimind_data.inputs.parquet import ParquetRows
from minimind_data.inputs.spec import RecordSpec

READER = """
import resource, sys
from minimind_data.inputs import held_record
from minimind_data.inputs.discovery import source_of
from minimind_data.inputs.forms import form_of
from minimind_data.inputs.parquet import ParquetRows
from minimind_data.inputs.spec import RecordSpec

held_record.MAX_RECORD_BYTES = 2**26
path, kind = sys.argv[1:]
source = source_of(path)
split = form_of(source, RecordSpec(), kind).splits([source], 2**26)[0][0]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
num_rows, bad = 0, []
for rows in ParquetRows(split, RecordSpec(), kind).batches():
    num_rows += len(rows.records)
    bad += [one.line for one in rows.bad()]
print(num_rows, bad)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
MEGABYTE = "z " * 2**19
LONG = "z " * 2**26


def conversations(*contents):
    return [[{"role": "user", "content": content} for content in row] for row in contents]


@pytest.mark.parametrize(
    ("kind", "columns", "options", "expected", "most"),
    [
        ("pretrain", {"text": [MEGABYTE] * 1024}, {}, "1024 []", 250),
        ("pretrain", {"text": [MEGABYTE] * 384}, {"use_dictionary": False, "write_batch_size": 8}, "384 []", 250),
        ("pretrain", {"text": ["a", LONG, "b"]}, {"use_dictionary": False}, "2 [2]", 600),
        ("sft", {"messages": conversations(["a"], [MEGABYTE] * 512, ["b"])}, {}, "2 [2]", 250),
    ],
    ids=["one entry", "rows", "a long text", "a long conversation"],
)  # fmt: skip
def test_bombs_take_little_memory(tmp_path, kind, columns, options, expected, most):
    """A gigabyte in a kilobyte; the limit of a row is 64 MiB here."""
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table(columns), path, compression="zstd", **options)
    assert path.stat().st_size < 2**16
    child = subprocess.run(
        [sys.executable, "-c", READER, path, kind], capture_output=True, text=True, check=True
    )
    result, peak = child.stdout.splitlines()
    assert result == expected
    assert int(peak) < most


def rows_of(path, kind):
    source = source_of(str(path))
    (splits,) = form_of(source, RecordSpec(), kind).splits([source], 2**30)
    reader = ParquetRows(splits[0], RecordSpec(), kind)
    parts = list(reader.batches())
    assert [rows.first for rows in parts] == [
        1 + sum(rows.num_rows for rows in parts[:place]) for place in range(len(parts))
    ]
    return parts, reader


WORDS = ["", "a", "猫" * 40, "longer " * 30, None]


@pytest.mark.parametrize(("version", "compression"), [("1.0", "zstd"), ("2.0", "lz4"), ("1.0", "none")])
def test_rows_and_digest_are_the_same_however_they_are_read(tmp_path, monkeypatch, version, compression):
    draw = random.Random(0)
    texts = [draw.choice(WORDS) for _ in range(300)]
    fixed = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]), 1)
    messages = [[{"role": "user", "content": text} for text in draw.choices(WORDS, k=draw.randint(0, 4))] for _ in texts]  # fmt: skip
    for kind, columns in (
        ("pretrain", {"text": texts}),
        ("pretrain", {"text": pa.array(texts, pa.string_view())}),
        ("pretrain", {"text": pa.array([text and text.encode() for text in texts], pa.large_binary())}),
        ("sft", {"messages": messages, "system": texts}),
        ("sft", {"messages": pa.array([[{"role": "user", "content": text}] for text in texts], fixed)}),
        ("sft", {"messages": messages, "tools": pa.array([[("a", text or "")] for text in texts], pa.map_(pa.string(), pa.string()))}),
    ):  # fmt: skip
        path = tmp_path / "x.parquet"
        table = pa.table(columns)
        pq.write_table(
            table, path, compression=compression, data_page_version=version,
            data_page_size=1000, write_batch_size=20, dictionary_pagesize_limit=4000,
        )  # fmt: skip
        values = [column.to_pylist() for column in table.columns]
        if table.schema.types[0] == pa.large_binary():
            values = [texts]
        expected = [dict(zip(table.column_names, row, strict=True)) for row in zip(*values, strict=True)]
        digest = sha256_of_bytes(b"".join(orjson.dumps(list(row.values())) + b"," for row in expected))
        for limits in ((2**27, 2**28, 2**25), (3000, 0, 500), (500, 100, 1)):
            for module, name, limit in zip(
                (parquet_pages, parquet_pages, parquet),
                ("_BATCH_BYTES", "_DICTIONARY_BYTES", "_PART_BYTES"),
                limits,
                strict=True,
            ):
                monkeypatch.setattr(module, name, limit)
            parts, reader = rows_of(path, kind)
            assert [record for rows in parts for record in rows.records] == expected
            assert reader.sha256 == digest
            if limits[2] == 1:
                assert {len(rows.records) for rows in parts} == {1}


def test_the_headers_of_all_pages_are_read(tmp_path):
    path = tmp_path / "x.parquet"
    texts = [str(number) * (number % 300) for number in range(5000)]
    for version in ("1.0", "2.0"):
        for use_dictionary in (True, False):
            pq.write_table(
                pa.table({"text": texts}), path, data_page_version=version, use_dictionary=use_dictionary,
                data_page_size=5000, write_batch_size=50, dictionary_pagesize_limit=100_000,
            )  # fmt: skip
            with path.open("rb") as file:
                chunk = pq.ParquetFile(file).metadata.row_group(0).column(0)
                pages = list(parquet_pages._pages(file, chunk))
                if use_dictionary:
                    longest = parquet_pages._longest_entry(file, pages[0], chunk.compression)
                    assert longest == max(map(len, texts[:300]))
            data = [page for page in pages if page.kind != parquet_pages._DICTIONARY]
            assert sum(page.values for page in data) == len(texts)
            assert len(data) > 10
            assert len(pages) - len(data) == use_dictionary


def test_damaged_headers_are_damage(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["some text"] * 50}), path)
    whole = path.read_bytes()
    draw = random.Random(0)
    errors = []
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(3):
            data[draw.randint(4, 60)] = draw.randint(0, 255)
        path.write_bytes(data)
        try:
            rows_of(path, "pretrain")
        except UserError as error:
            errors.append(str(error))
    assert len(errors) > 100
    assert all("x.parquet: damaged or cut off" in error for error in errors)


def test_what_no_text_or_conversation_is_like_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(held_record, "MAX_RECORD_BYTES", 2**20)
    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.table({"text": ["z" * 1000] * 3000}), path, use_dictionary=False, compression="zstd",
        data_page_size=2**30, write_batch_size=5000,
    )  # fmt: skip
    with pytest.raises(
        UserError,
        match=r"x\.parquet: column 'text' of row group 0 has a page of 2 MiB, and at most 1 are read",
    ):
        rows_of(path, "pretrain")
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    pq.write_table(pa.table({"messages": pa.array([[None] * 1_000_000], kind)}), path)
    with pytest.raises(
        UserError, match=r"row group 0 unpacks to 15 MiB, [\d,]+ times what is stored; no conversations"
    ):
        rows_of(path, "sft")
