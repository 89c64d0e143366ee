"""Sources: what an input stands for, in which order, and what form each file has."""

import gzip
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimind_data.errors import UserError
from minimind_data.inputs.discovery import find_sources, source_of, stem_of
from minimind_data.inputs.sources import Source

LINE = b'{"text": "a"}\n'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus" / "b").mkdir(parents=True)
    (tmp_path / "corpus" / ".hidden").mkdir()
    for name in ("z.jsonl", "a.ndjson", "b/c.json", ".hidden/x.jsonl", ".y.jsonl"):
        (tmp_path / "corpus" / name).write_bytes(LINE)
    (tmp_path / "corpus" / "d.jsonl.gz").write_bytes(gzip.compress(LINE))
    (tmp_path / "corpus" / "e.txt").write_text("text")
    (tmp_path / "corpus" / "README.md").write_text("hello")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "corpus" / "f.parquet")
    return tmp_path


def test_a_folder_stands_for_its_files_of_known_form(folder):
    sources, notes = find_sources(["corpus"])
    assert [(source.name, source.form, source.compression) for source in sources] == [
        ("corpus/a.ndjson", "jsonl", None),
        ("corpus/b/c.json", "jsonl", None),
        ("corpus/d.jsonl.gz", "jsonl", "gzip"),
        ("corpus/e.txt", "text", None),
        ("corpus/f.parquet", "parquet", None),
        ("corpus/z.jsonl", "jsonl", None),
    ]
    assert notes == ["corpus: 1 files of no known form are left out (README.md)"]
    assert [source.name for source in find_sources(["corpus"], "text")[0]][:2] == [
        "corpus/README.md",
        "corpus/a.ndjson",
    ]


def test_globs_keep_the_order_of_the_inputs(folder):
    sources, _ = find_sources(["corpus/z*", "corpus/**/*.json", "corpus/a.ndjson"])
    assert [source.name for source in sources] == ["corpus/z.jsonl", "corpus/b/c.json", "corpus/a.ndjson"]
    with pytest.raises(UserError, match=r"corpus/\*\.nope: no file matches"):
        find_sources(["corpus/*.nope"])


def test_a_file_named_twice_is_refused(folder):
    with pytest.raises(
        UserError, match=r"corpus/z\.jsonl: named twice \(by corpus and by \./corpus/z\.jsonl\)"
    ):
        find_sources(["corpus", "./corpus/z.jsonl"])


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("a/pretrain_hq.jsonl", "pretrain_hq"),
        ("x.JSONL.GZ", "x"),
        ("x.tar.jsonl.zst", "x.tar"),
        ("wiki.parquet", "wiki"),
        ("s3://bucket/deep/part-0.txt?region=x", "part-0"),
        ("noform", "noform"),
        (".jsonl", ".jsonl"),
        ("-", "stdin"),
        ("what?.jsonl", "what?"),
        ("s3://bucket/a%20b%3F.jsonl", "a b?"),
        ("é" * 120 + ".jsonl", "é" * 80),
    ],
)
def test_shards_are_named_after_their_source(name, stem):
    assert stem_of(Source(name=name, location=name, form="jsonl")) == stem


@pytest.mark.parametrize(
    ("name", "data", "form"),
    [
        ("x", LINE, "jsonl"),
        ("x.unknown", b"\xef\xbb\xbf  \n" + LINE, "jsonl"),
        ("x.txt", LINE, "text"),
        ("x.jsonl", b"not json at all", "jsonl"),
        ("x.JSON", LINE, "jsonl"),
    ],
)
def test_forms_are_told(tmp_path, name, data, form):
    (tmp_path / name).write_bytes(data)
    assert source_of(str(tmp_path / name)).form == form


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("x.bin", b"\x00\x01", "its form cannot be told; say `format` jsonl, parquet, text"),
        ("x.parquet", LINE, "no Parquet file, whatever its name says"),
        ("x.json", b'[\n {"text": "a"}]', "one JSON array, not one record a line; rewrite it, as with `jq"),
        ("x.jsonl.bz2", b"BZh91AY", "a bzip2 file; unpack it"),
        ("x.zip", b"PK\x03\x04", "a zip file; unpack it"),
        ("x.gz", gzip.compress(b"", mtime=0), "nothing is in it once decompressed"),
        ("x.gz", gzip.compress(b"PAR1", mtime=0), "a compressed Parquet file; decompress it"),
        ("x.gz", b"\x1f\x8b and no more", "damaged or cut off"),
        ("x.jsonl", b"", "the file is empty"),
        ("x.jsonl", LINE.decode().encode("utf-16"), "looks like UTF-16, .* `iconv -f UTF-16 -t UTF-8`"),
        (
            "x.jsonl",
            LINE.decode().encode("utf-16-le"),
            "looks like UTF-16LE, and text is read as UTF-8; convert",
        ),
        (
            "x.txt",
            "字，a plain text".encode("utf-16-be"),
            "looks like UTF-16BE, .* `iconv -f UTF-16BE -t UTF-8`",
        ),
        ("x.txt", "文本".encode("utf-32"), "looks like UTF-32, .* `iconv -f UTF-32 -t UTF-8`"),
        ("x.jsonl.gz", gzip.compress(LINE.decode().encode("utf-16-le")), "looks like UTF-16LE"),
    ],
)
def test_what_is_no_input_says_why(tmp_path, name, data, complaint):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=complaint) as caught:
        source_of(str(tmp_path / name))
    assert str(caught.value).startswith(str(tmp_path / name))


def test_a_name_that_a_manifest_cannot_hold_is_refused(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    path.write_bytes(LINE)
    with pytest.raises(
        UserError, match="the name is no UTF-8, so a manifest cannot hold it; rename the file"
    ):
        source_of(str(path))


def test_inputs_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    for name, complaint in (
        ("pipe", "a pipe or a device, which cannot be read twice; save it to a file, or pipe it into `-`"),
        ("nope.jsonl", "no such file"),
        ("empty", "a folder without any file of a known form"),
        ("nosuch://bucket/x", "cannot be reached"),
    ):
        given = name if "://" in name else str(tmp_path / name)
        with pytest.raises(UserError, match=complaint):
            find_sources([given])


def test_links_are_followed_once_and_nothing_is_left_out_in_silence(folder):
    corpus = folder / "corpus"
    (corpus / "f.parquet").unlink()
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "linked.jsonl").write_bytes(LINE)
    (corpus / "link").symlink_to(folder / "elsewhere")
    (corpus / "b" / "loop").symlink_to(corpus)
    names = [source.name for source in find_sources(["corpus"])[0]]
    assert "corpus/link/linked.jsonl" in names
    assert len(names) == len({os.path.realpath(name) for name in names}) == 6
    (corpus / "gone.jsonl").symlink_to("nowhere.jsonl")
    with pytest.raises(UserError, match=r"corpus/gone\.jsonl: no such file"):
        find_sources(["corpus"])
    (corpus / "gone.jsonl").unlink()
    os.mkfifo(corpus / "pipe.jsonl")
    with pytest.raises(UserError, match=r"corpus/pipe\.jsonl: a pipe or a device"):
        find_sources(["corpus"])


def test_a_folder_that_cannot_be_listed_is_refused(folder, monkeypatch):
    listed = os.scandir

    def refuse(path):
        if str(path) == "corpus/b":
            raise PermissionError(13, "Permission denied", "corpus/b")
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)  # permissions bind no test that runs as root
    with pytest.raises(UserError, match=r"corpus/b: cannot be looked into \(Permission denied\)"):
        find_sources(["corpus"])


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 3000, "loop", "loop/x", "file.jsonl/x"])
def test_paths_that_no_system_takes(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file.jsonl").write_bytes(LINE)
    with pytest.raises(UserError, match=r"(no such file|cannot be (opened|looked into))"):
        find_sources([str(tmp_path / name)])
