"""What a conversion as a whole promises: the same documents, true provenance, all or nothing."""

import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from minimind_data.dataset.format import Manifest
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.interchange.conversion import ConvertOptions, convert
from minimind_data.interchange.formats import ALIASES, FORMATS, detect

BOS, EOS = 1, 2
BORDERS = [name for name, token_format in FORMATS.items() if token_format.divider is None]
DOCUMENTS = [[5, 6, 7], [8], [9, 10, 3, 49], [11] * 30, [12, 13]]


def framed(documents):
    return [[BOS, *document, EOS] for document in documents]


@pytest.fixture
def dataset(bring, tmp_path, write_megatron):
    """A dataset of ours in several shards, made out of DOCUMENTS."""
    bring(write_megatron(tmp_path / "first", DOCUMENTS), "ours", shard_bytes=30)
    assert len(ShardSet.open(tmp_path / "ours")) > 2
    return tmp_path / "ours"


@pytest.mark.parametrize("one_file", [False, True])
@pytest.mark.parametrize("kind", [*FORMATS, *ALIASES])
def test_there_and_back_gives_the_same_documents(dataset, bring, tmp_path, kind, one_file):
    summary = convert(dataset, ConvertOptions(out=tmp_path / "theirs", one_file=one_file), target_format=kind)
    assert summary.files == (1 if one_file or kind == "nanogpt" else len(ShardSet.open(dataset)))
    assert summary.divided == 0
    found, back = bring(tmp_path / "theirs", kind="nanogpt" if kind == "nanogpt" else "auto")
    assert found == framed(DOCUMENTS)
    assert back.empty == 0
    assert back.bos_added == (len(DOCUMENTS) if kind == "nanogpt" else 0)
    assert back.eos_added == (len(DOCUMENTS) if kind in {"llmc", "llmc-llama3", "modded-nanogpt"} else 0)


def test_what_stands_in_the_files_byte_for_byte(bring, tmp_path, write_megatron):
    bring(write_megatron(tmp_path / "x", [[5, 6], [7]]), "ours")
    for kind in ("datatrove", "llmc", "nanogpt", "megatron"):
        convert(tmp_path / "ours", ConvertOptions(out=tmp_path / kind), target_format=kind)
    ids = np.array([BOS, 5, 6, EOS, BOS, 7, EOS], "<u2").tobytes()
    assert (tmp_path / "datatrove" / "x-00000.ds").read_bytes() == ids
    assert (tmp_path / "datatrove" / "x-00000.ds.index").read_bytes() == struct.pack("<2Q", 4, 7)
    assert (tmp_path / "datatrove" / "x-00000.ds.metadata").read_text() == "tokenizer.json|2\n7\n7 T"
    assert (tmp_path / "megatron" / "x-00000.bin").read_bytes() == ids
    llmc = (tmp_path / "llmc" / "x-00000.bin").read_bytes()
    assert llmc == struct.pack("<3i1012x", 20240520, 1, 5) + struct.pack("<5H", BOS, 5, 6, BOS, 7)
    assert (tmp_path / "nanogpt" / "train.bin").read_bytes() == struct.pack("<5H", 5, 6, EOS, 7, EOS)


def test_an_import_says_truly_what_it_was_made_of(bring, tmp_path, write_megatron):
    stem = write_megatron(tmp_path / "x", DOCUMENTS)
    bring(stem, "made", shard_bytes=30)
    manifest = Manifest.read(tmp_path / "made")
    data = (tmp_path / "x.bin").read_bytes()
    assert [Path(entry.path).name for entry in manifest.inputs] == ["x.bin", "x.idx"]
    assert manifest.options == {"converted_from": "megatron", "shard_bytes": 30}
    borders = [
        (entry.origin.input, entry.origin.input_start, entry.origin.input_stop) for entry in manifest.shards
    ]
    assert borders == [(0, 0, 16), (0, 16, 76), (0, 76, 80)]
    assert borders[-1][-1] == len(data)
    bring(stem, "again", shard_bytes=2**20)
    again = Manifest.read(tmp_path / "again")
    assert again.fingerprint == manifest.fingerprint  # where shards end is no part of it
    assert again.shards[0].origin.input_sha256 == manifest.inputs[0].sha256
    changed = [DOCUMENTS[0], [*DOCUMENTS[1], *DOCUMENTS[2]], *DOCUMENTS[3:]]  # the same .bin, other borders
    bring(write_megatron(tmp_path / "x", changed), "other")
    assert Manifest.read(tmp_path / "other").fingerprint != manifest.fingerprint


def test_documents_that_divide_are_counted(bring, tmp_path, write_megatron):
    bring(write_megatron(tmp_path / "x", [[5, EOS, 6], [BOS, 7, BOS, 8], [9]]), "ours")
    out = ConvertOptions(out=tmp_path / "n")
    assert convert(tmp_path / "ours", out, target_format="nanogpt").divided == 1
    out = ConvertOptions(out=tmp_path / "l")
    assert convert(tmp_path / "ours", out, target_format="llmc").divided == 1
    ids = np.fromfile(tmp_path / "n" / "train.bin", "<u2").tolist()
    assert ids == [5, EOS, 6, EOS, 7, BOS, 8, EOS, 9, EOS]


def test_an_export_never_passes_damage_on(dataset, tmp_path):
    path = dataset / f"{Manifest.read(dataset).shards[1].name}.bin"
    data = bytearray(path.read_bytes())
    data[2] ^= 1
    path.write_bytes(data)
    for kind in (*BORDERS, "nanogpt", "llmc"):
        with pytest.raises(UserError, match=rf"{path.name}: SHA-256 .* it is damaged"):
            convert(dataset, ConvertOptions(out=tmp_path / kind), target_format=kind)
        assert not (tmp_path / kind).exists()


def test_megatron_shards_are_linked_unless_copies_are_asked_for(dataset, tmp_path):
    name = f"{Manifest.read(dataset).shards[0].name}.bin"
    for copy, links in ((True, 1), (False, 2)):
        out = tmp_path / f"copy-{copy}"
        convert(dataset, ConvertOptions(out=out, copy=copy), target_format="megatron")
        assert (out / name).stat().st_nlink == links
        assert (out / name).read_bytes() == (dataset / name).read_bytes()


def test_a_vocabulary_too_large_for_a_format_is_refused(make_dataset, tmp_path):
    folder = make_dataset([[5, 6]], vocab_size=70_000).folder
    for kind in ("nanogpt", "llmc"):
        with pytest.raises(
            UserError, match=f"does not fit the 2-byte ids of {kind}; take `target_format` llmc-llama3"
        ):
            convert(folder, ConvertOptions(out=tmp_path / "o"), target_format=kind)
    convert(folder, ConvertOptions(out=tmp_path / "o"), target_format="llmc-llama3")
    ids = np.fromfile(tmp_path / "o" / "text-00000.bin", "<u4", offset=1024)
    assert ids.tolist() == [BOS, 3, 4, 5, BOS, 6, 7, 8, 9]


@pytest.mark.parametrize("kind", ["shards", "hf"])
def test_a_death_before_any_flush_or_rename_leaves_nothing_and_the_next_run_all(
    dataset, bring, small_tokenizer, tmp_path, monkeypatch, kind, write_megatron
):
    source = dataset if kind == "hf" else write_megatron(tmp_path / "x", DOCUMENTS)
    out = tmp_path / "made"
    options = ConvertOptions(out=out, tokenizer=small_tokenizer, shard_bytes=30)
    steps = iter(range(10**6))
    die_at = 10**6

    class DiedError(BaseException):
        pass

    def dying(real):
        def call(*arguments):
            if next(steps) == die_at:
                raise DiedError
            return real(*arguments)

        return call

    monkeypatch.setattr(os, "fsync", dying(os.fsync))
    monkeypatch.setattr(Path, "replace", dying(Path.replace))
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # who is killed cleans nothing up
    convert(source, options, target_format=kind)
    wanted = {path.name: path.read_bytes() for path in out.iterdir()}
    num_steps = next(steps)
    assert num_steps > 6
    monkeypatch.undo()
    for die_at in range(num_steps - 1):  # noqa: B007 - the closure reads it; the last is the flush of a name that is there
        shutil.rmtree(out)
        steps = iter(range(10**6))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", dying(os.fsync))
            patch.setattr(Path, "replace", dying(Path.replace))
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            with pytest.raises(DiedError):
                convert(source, options, target_format=kind)
        assert not out.exists()
        assert (tmp_path / "made.mm-data.partial").exists()
        convert(source, options, target_format=kind)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == wanted
        assert not (tmp_path / "made.mm-data.partial").exists()


def test_what_stands_at_out_is_left_alone(dataset, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("a")
    (tmp_path / "file").write_text("b")
    for name, match in (("full", "not empty"), ("file", "a file")):
        with pytest.raises(UserError, match=match):
            convert(dataset, ConvertOptions(out=tmp_path / name), target_format="hf")
    assert (tmp_path / "full" / "a").read_text() == "a"
    (tmp_path / "empty").mkdir()
    convert(dataset, ConvertOptions(out=tmp_path / "empty"), target_format="hf")
    assert (tmp_path / "empty" / "state.json").exists()


def test_formats_that_do_not_go_together(dataset, bring, tmp_path, write_megatron):
    def refused(match, source, **formats):
        with pytest.raises(UserError, match=match):
            convert(source, ConvertOptions(out=tmp_path / "o"), **formats)

    stem = write_megatron(tmp_path / "x", DOCUMENTS)
    refused("is a dataset of this program already", dataset)
    refused("is megatron, and one side must be shards", stem, target_format="hf")
    refused("'hff' is no format; known are shards, megatron", dataset, target_format="hff")
    refused("name the tokenizer.json with `tokenizer`", stem)
    refused("no such file", tmp_path / "nowhere")
    with pytest.raises(UserError, match="no document with any token in it"):
        bring(write_megatron(tmp_path / "e", [[], [BOS], [BOS, EOS]]))


def test_the_format_is_told_by_content(dataset, tmp_path):
    assert detect(dataset) == "shards"
    for kind in (*BORDERS, "llmc", "llmc-llama3"):
        convert(dataset, ConvertOptions(out=tmp_path / kind), target_format=kind)
        assert detect(tmp_path / kind) == kind
    shutil.copy(next((tmp_path / "llmc").glob("*.bin")), tmp_path / "parquet" / "x.bin")
    with pytest.raises(
        UserError, match=r"files of several formats \(llmc, parquet\); say which with `source_format`"
    ):
        detect(tmp_path / "parquet")


def test_hugging_face_datasets_reads_ours_and_we_read_theirs(dataset, bring, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    convert(dataset, ConvertOptions(out=tmp_path / "hf"), target_format="hf")
    theirs = datasets.load_from_disk(tmp_path / "hf")
    assert theirs["input_ids"][:] == framed(DOCUMENTS)
    theirs.select([4, 2, 0]).save_to_disk(tmp_path / "back", num_shards=2)
    assert bring(tmp_path / "back")[0] == framed([DOCUMENTS[4], DOCUMENTS[2], DOCUMENTS[0]])
