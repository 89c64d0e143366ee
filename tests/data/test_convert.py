"""Token files of other projects: what comes in is what they wrote, what goes out is what they read."""

import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_data.convert import ConvertOptions, convert
from minimind_data.errors import UserError
from minimind_data.foreign import detect
from minimind_data.format import Manifest, TokenizerInfo
from minimind_data.framing import cut, frame
from minimind_data.shards import ShardSet
from minimind_data.verify import verify

BOS, EOS, PAD = 1, 2, 0
VOCAB = 50
BORDERS = ["megatron", "datatrove", "hf", "parquet"]
DOCUMENTS = [[5, 6, 7], [8], [9, 10, 3, 49], [11] * 30, [12, 13]]


@pytest.fixture
def tokenizer(tmp_path):
    """A folder with a tokenizer of 50 entries; the ids are what matters here."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    words = {"<pad>": PAD, "<s>": BOS, "</s>": EOS} | {f"w{i}": i for i in range(3, VOCAB)}
    model = tokenizers.models.WordLevel(words, "<pad>")
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def bring(tokenizer, tmp_path):
    """Convert a source into a dataset and return its documents."""

    def call(source, name="made", kind="auto", **options):
        options = ConvertOptions(out=tmp_path / name, **{"tokenizer": tokenizer, **options})
        summary = convert(source, options, source_format=kind)
        assert not verify(tmp_path / name).problems
        return documents_of(tmp_path / name), summary

    return call


@pytest.fixture
def dataset(bring, tmp_path):
    """A dataset of ours in several shards, made out of DOCUMENTS."""
    bring(write_megatron(tmp_path / "first", DOCUMENTS), "ours", shard_bytes=30)
    assert len(ShardSet.open(tmp_path / "ours")) > 2
    return tmp_path / "ours"


def documents_of(folder):
    shards = ShardSet.open(folder)
    found = []
    for shard in shards:
        starts = shard.offsets // shards.dtype.itemsize
        found += [
            shard.tokens[start : start + length].tolist()
            for start, length in zip(starts, shard.lengths, strict=True)
        ]
    return found


def framed(documents):
    return [[BOS, *document, EOS] for document in documents]


def write_megatron(stem, documents, dtype="<u2", code=8, *, sequences_of=None, modes=b""):
    """Write a pair as Megatron's _IndexWriter lays it out; `sequences_of` divides a document."""
    sequences_of = sequences_of or (lambda document: [document])
    sequences = [sequence for document in documents for sequence in sequences_of(document)]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    starts = np.cumsum([0, *(len(sequences_of(document)) for document in documents)])
    offsets = (np.cumsum(lengths) - lengths) * np.dtype(dtype).itemsize
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(starts))
    index += lengths.tobytes() + offsets.astype("<i8").tobytes() + starts.astype("<i8").tobytes() + modes
    stem.with_name(stem.name + ".idx").write_bytes(index)
    ids = [token for document in documents for token in document]
    stem.with_name(stem.name + ".bin").write_bytes(np.array(ids, dtype).tobytes())
    return stem


def write_llmc(path, ids, magic=20240520, version=1, dtype="<u2"):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(header.tobytes() + np.array(ids, dtype).tobytes())
    return path


def write_datatrove(path, documents, dtype="<u2", metadata="tok|2\n9\n9 T"):
    ids = [token for document in documents for token in document]
    path.write_bytes(np.array(ids, dtype).tobytes())
    Path(f"{path}.index").write_bytes(np.cumsum([len(one) for one in documents]).astype("<u8").tobytes())
    if metadata:
        Path(f"{path}.metadata").write_text(metadata)
    return path


def write_hf(folder, batches, kind=None, column="input_ids"):
    """Write a saved dataset: record batches of documents, all in one file."""
    folder.mkdir()
    schema = pa.schema([(column, kind or pa.list_(pa.int32()))])
    with pa.OSFile(str(folder / "data.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(pa.record_batch([pa.array(batch, schema.field(0).type)], schema=schema))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.mark.parametrize("one_file", [False, True])
@pytest.mark.parametrize("kind", [*BORDERS, "nanogpt", "llmc", "llmc-llama3", "modded-nanogpt"])
def test_there_and_back_gives_the_same_documents(dataset, bring, tmp_path, kind, one_file):
    summary = convert(dataset, ConvertOptions(out=tmp_path / "theirs", one_file=one_file), target_format=kind)
    assert summary.files == (1 if one_file or kind == "nanogpt" else len(ShardSet.open(dataset)))
    assert summary.divided == 0
    found, back = bring(tmp_path / "theirs", kind="nanogpt" if kind == "nanogpt" else "auto")
    assert found == framed(DOCUMENTS)
    assert back.empty == 0
    assert back.bos_added == (len(DOCUMENTS) if kind == "nanogpt" else 0)
    assert back.eos_added == (len(DOCUMENTS) if kind in {"llmc", "llmc-llama3", "modded-nanogpt"} else 0)


@pytest.mark.parametrize(
    ("dtype", "code"), [("<u1", 1), ("<i1", 2), ("<i2", 3), ("<i4", 4), ("<i8", 5), ("<u2", 8)]
)
def test_megatron_dtypes_and_several_sequences(bring, tmp_path, dtype, code):
    stem = write_megatron(
        tmp_path / "x.y", DOCUMENTS, dtype, code, sequences_of=lambda one: [one[:1], [], one[1:]]
    )
    for name, source in (
        ("a", stem),
        ("b", stem.with_name("x.y.bin")),
        ("c", stem.with_name("x.y.idx")),
        ("d", tmp_path),
    ):
        found, summary = bring(source, name) if name != "d" else bring(source, name, "megatron")
        assert found == framed(DOCUMENTS)
        assert summary.bos_added == summary.eos_added == len(DOCUMENTS)


def test_what_megatron_cannot_mean(bring, tmp_path):
    def refused(match, stem):
        with pytest.raises(UserError, match=match):
            bring(stem)
        assert not (tmp_path / "made").exists()

    refused("float32", write_megatron(tmp_path / "f", DOCUMENTS, "<f4", 7))
    refused("multimodal", write_megatron(tmp_path / "m", DOCUMENTS, modes=bytes(len(DOCUMENTS))))
    refused("dtype code 9", write_megatron(tmp_path / "c", DOCUMENTS, code=9))
    short = write_megatron(tmp_path / "s", DOCUMENTS)
    bin_path, idx_path = tmp_path / "s.bin", tmp_path / "s.idx"
    whole = bin_path.read_bytes()
    bin_path.write_bytes(whole[:-2])
    refused("s.bin: ends at byte", short)
    bin_path.write_bytes(whole + b"\0\0")
    refused("its index speaks of 80", short)
    bin_path.write_bytes(whole)
    index = bytearray(idx_path.read_bytes())
    idx_path.write_bytes(index[:-1])
    refused("s.idx: 141 bytes, where its header wants 142", short)
    index[34 + 4 * 5 + 8] += 2  # the second sequence's offset
    idx_path.write_bytes(index)
    refused("do not stand end to end", short)
    index[34 + 4 * 5 + 8] -= 2
    index[-8] -= 1  # the last document ends before the last sequence
    idx_path.write_bytes(index)
    refused("do not follow one another", short)
    idx_path.unlink()
    refused("nothing in it says what format", bin_path)
    with pytest.raises(UserError, match="s.idx: no such file; megatron needs it, an .idx beside every .bin"):
        bring(bin_path, kind="megatron")


@pytest.mark.parametrize("where", ["before", "behind", "both", "between"])
@pytest.mark.parametrize("separator", [PAD, BOS, EOS, 40])
@pytest.mark.parametrize("shard_bytes", [2, 14, 2**20])
def test_a_stream_is_cut_wherever_the_separator_stands(bring, tmp_path, where, separator, shard_bytes):
    ids = []
    for document in DOCUMENTS:
        ids += [separator] * (where != "behind") + document + [separator] * (where in {"behind", "both"})
    ids = ids[where == "between" :]
    (tmp_path / "train.bin").write_bytes(np.array(ids, "<u2").tobytes())
    found, summary = bring(
        tmp_path / "train.bin", kind="nanogpt", separator_id=separator, shard_bytes=shard_bytes
    )
    assert found == framed(DOCUMENTS)
    assert summary.bos_added == (0 if separator == BOS else len(DOCUMENTS))
    assert summary.eos_added == (0 if separator == EOS else len(DOCUMENTS))


@pytest.mark.parametrize("tokens_per_file", range(1, 50, 3))
@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")])
def test_llmc_documents_reach_across_files(bring, tmp_path, tokens_per_file, magic, version, dtype):
    ids = [token for document in DOCUMENTS for token in (40, *document)]
    for first in range(0, len(ids), tokens_per_file):
        part = ids[first : first + tokens_per_file]
        write_llmc(tmp_path / "parts" / f"d_{first:06d}.bin", part, magic, version, dtype)
    found, _ = bring(tmp_path / "parts", separator_id=40, shard_bytes=40)
    assert found == framed(DOCUMENTS)


def test_what_a_stream_cannot_mean(bring, tmp_path):
    path = write_llmc(tmp_path / "parts" / "a.bin", [40, 5, 6])
    with pytest.raises(UserError, match="a.bin: the id 1, at which documents are cut, stands nowhere in it"):
        bring(path)
    with pytest.raises(UserError, match="begins with 20240520, 1, where this format has 20240801, 7"):
        bring(path, kind="llmc-llama3")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="1,029 bytes, where its header speaks of 3 tokens, 1,030 bytes"):
        bring(path)
    with pytest.raises(UserError, match="no whole number of 2-byte ids"):
        bring(path, kind="nanogpt")
    with pytest.raises(UserError, match="leave out --separator-id"):
        bring(write_megatron(tmp_path / "x", DOCUMENTS), separator_id=3)


@pytest.mark.parametrize(("dtype", "metadata"), [("<u2", "a|b|2\n"), ("<u4", "tok|4\n"), ("<u4", "")])
def test_datatrove_token_sizes(bring, tmp_path, dtype, metadata):
    source = write_datatrove(tmp_path / "x.ds", [[*one, EOS] for one in DOCUMENTS], dtype, metadata)
    found, summary = bring(source)
    assert found == framed(DOCUMENTS)
    assert (summary.bos_added, summary.eos_added) == (len(DOCUMENTS), 0)


def test_what_datatrove_cannot_mean(bring, tmp_path):
    path = write_datatrove(tmp_path / "x.ds", DOCUMENTS, metadata="tok|4\n")
    with pytest.raises(UserError, match="says 4 bytes a token, where the file and its index say 2"):
        bring(path)
    write_datatrove(path, DOCUMENTS)
    Path(f"{path}.loss").write_bytes(b"")
    with pytest.raises(UserError, match="a loss mask, which would be lost"):
        bring(path)
    Path(f"{path}.loss").unlink()
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="78 bytes do not hold the 40 tokens of its index"):
        bring(path)
    write_datatrove(path, DOCUMENTS)
    Path(f"{path}.index").write_bytes(np.array([3, 2, 40], "<u8").tobytes())
    with pytest.raises(UserError, match="x.ds.index: the ends of documents 0 to 3 do not grow"):
        bring(path)


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int64()), pa.large_list(pa.uint16()), pa.list_(pa.int8()), pa.list_(pa.uint64())]
)
def test_tables_of_any_integer_list(bring, tmp_path, kind):
    source = write_hf(tmp_path / "hf", [DOCUMENTS[:2], [], DOCUMENTS[2:]], kind)
    assert bring(source, "a")[0] == framed(DOCUMENTS)
    pq.write_table(pa.table({"ids": pa.array(DOCUMENTS, kind)}), tmp_path / "x.parquet", row_group_size=2)
    assert bring(tmp_path / "x.parquet", "b", column="ids")[0] == framed(DOCUMENTS)


def test_rows_of_fixed_length_and_arrow_files_that_are_no_streams(bring, tmp_path):
    rows = pa.array([[3, 4], [5, 6]], pa.list_(pa.int32(), 2))
    source = write_hf(tmp_path / "hf", [rows], rows.type)
    assert bring(source, "a")[0] == framed([[3, 4], [5, 6]])
    table = pa.table({"input_ids": rows})
    with pa.OSFile(str(source / "data.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert bring(source, "b")[0] == framed([[3, 4], [5, 6]])


def test_what_a_table_cannot_mean(bring, tmp_path):
    numbers = iter(range(100))

    def refused(match, batches, kind=None, **options):
        with pytest.raises(UserError, match=match):
            bring(write_hf(tmp_path / f"hf{next(numbers)}", batches, kind), **options)

    refused(r"row 2 has no 'input_ids'", [[[3], [4]], [None]])
    refused(r"'input_ids' of row 1, token 1 is null", [[[3, 3], [4, None]]])
    refused(r"'input_ids' of row 2, token 0 is 50, where the tokenizer has ids 0 to 49", [[[3], [4]], [[50]]])
    refused(r"is of type list<item: string>", [[["3"]]], pa.list_(pa.string()))
    refused(r"no column 'ids'; it has input_ids", [[[3]]], column="ids")
    whole = write_hf(tmp_path / "cut", [DOCUMENTS, DOCUMENTS]) / "data.arrow"
    data = whole.read_bytes()
    for length in range(len(data)):  # cut off anywhere, even between two batches
        whole.write_bytes(data[:length])
        if length == len(data) - 4:
            continue  # the end mark may be four bytes long too
        with pytest.raises(UserError, match="data.arrow"):
            bring(whole.parent)
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(
        UserError, match="holds several splits; name one of them: .*splits/train, .*splits/test"
    ):
        bring(tmp_path / "splits")


@pytest.mark.parametrize("bad", [-1, VOCAB, 2**31 - 1])
def test_an_id_beyond_the_vocabulary_is_named(bring, tmp_path, bad):
    stem = write_megatron(tmp_path / "x", [[5, 6], [7, bad]], "<i4", 4)
    with pytest.raises(UserError, match=rf"x.bin: token 3 is {bad}, where the tokenizer has ids 0 to 49"):
        bring(stem)
    assert not (tmp_path / "made").exists()


def test_an_import_says_truly_what_it_was_made_of(bring, tmp_path):
    stem = write_megatron(tmp_path / "x", DOCUMENTS)
    bring(stem, "made", shard_bytes=30)
    manifest = Manifest.read(tmp_path / "made")
    data = (tmp_path / "x.bin").read_bytes()
    assert [Path(entry.path).name for entry in manifest.inputs] == ["x.bin", "x.idx"]
    assert manifest.options == {"converted_from": "megatron", "shard_bytes": 30}
    borders = [(entry.input, entry.input_start, entry.input_stop) for entry in manifest.shards]
    assert borders == [(0, 0, 16), (0, 16, 76), (0, 76, 80)]
    assert borders[-1][-1] == len(data)
    bring(stem, "again", shard_bytes=2**20)
    again = Manifest.read(tmp_path / "again")
    assert again.fingerprint == manifest.fingerprint  # where shards end is no part of it
    assert again.shards[0].input_sha256 == manifest.inputs[0].sha256
    changed = [DOCUMENTS[0], [*DOCUMENTS[1], *DOCUMENTS[2]], *DOCUMENTS[3:]]  # the same .bin, other borders
    bring(write_megatron(tmp_path / "x", changed), "other")
    assert Manifest.read(tmp_path / "other").fingerprint != manifest.fingerprint


def test_documents_that_divide_are_counted(bring, tmp_path):
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
        with pytest.raises(UserError, match=f"does not fit the 2-byte ids of {kind}; take --to llmc-llama3"):
            convert(folder, ConvertOptions(out=tmp_path / "o"), target_format=kind)
    convert(folder, ConvertOptions(out=tmp_path / "o"), target_format="llmc-llama3")
    ids = np.fromfile(tmp_path / "o" / "text-00000.bin", "<u4", offset=1024)
    assert ids.tolist() == [BOS, 3, 4, 5, BOS, 6, 7, 8, 9]


@pytest.mark.parametrize("kind", ["shards", "hf"])
def test_a_death_before_any_flush_or_rename_leaves_nothing_and_the_next_run_all(
    dataset, bring, tokenizer, tmp_path, monkeypatch, kind
):
    source = dataset if kind == "hf" else write_megatron(tmp_path / "x", DOCUMENTS)
    out = tmp_path / "made"
    options = ConvertOptions(out=out, tokenizer=tokenizer, shard_bytes=30)
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


def test_formats_that_do_not_go_together(dataset, bring, tmp_path):
    def refused(match, source, **formats):
        with pytest.raises(UserError, match=match):
            convert(source, ConvertOptions(out=tmp_path / "o"), **formats)

    stem = write_megatron(tmp_path / "x", DOCUMENTS)
    refused("is a dataset of this program already", dataset)
    refused("is megatron, and one side must be shards", stem, target_format="hf")
    refused("'hff' is no format; known are shards, megatron", dataset, target_format="hff")
    refused("name the tokenizer.json with --tokenizer", stem)
    refused("no such file", tmp_path / "nowhere")
    with pytest.raises(UserError, match="no document with any token in it"):
        bring(write_megatron(tmp_path / "e", [[], [BOS], [BOS, EOS]]))


def test_the_format_is_told_by_content(dataset, tmp_path):
    assert detect(dataset) == "shards"
    for kind in (*BORDERS, "llmc", "llmc-llama3"):
        convert(dataset, ConvertOptions(out=tmp_path / kind), target_format=kind)
        assert detect(tmp_path / kind) == kind
    shutil.copy(next((tmp_path / "llmc").glob("*.bin")), tmp_path / "parquet" / "x.bin")
    with pytest.raises(UserError, match=r"files of several formats \(llmc, parquet\); say which with --from"):
        detect(tmp_path / "parquet")


@settings(max_examples=200, deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=12), same=st.booleans())
def test_framing_adds_what_is_missing_and_nothing_else(documents, same):
    eos = 1 if same else 2
    info = TokenizerInfo(sha256="", vocab_size=6, bos_id=1, eos_id=eos, pad_id=0)
    wanted, bos_added, eos_added, empty = [], 0, 0, 0
    for document in documents:
        ids = list(document)
        has_bos = ids[:1] == [1]
        ids = ids[has_bos:]
        has_eos = ids[-1:] == [eos]
        ids = ids[: len(ids) - has_eos]
        if ids:
            wanted.append([1, *ids, eos])
            bos_added, eos_added = bos_added + (not has_bos), eos_added + (not has_eos)
        else:
            empty += 1
    tokens = np.array([token for document in documents for token in document], np.int64)
    made = frame(tokens, np.array([len(one) for one in documents], np.int64), info, "uint16")
    assert [part.tolist() for part in np.split(made.tokens, np.cumsum(made.lengths)[:-1])] == (wanted or [[]])
    assert (made.bos_added, made.eos_added, made.empty) == (bos_added, eos_added, empty)


@given(lengths=st.lists(st.integers(0, 9)), most=st.integers(1, 12))
def test_cut_covers_every_document_once_within_the_bound(lengths, most):
    ranges = list(cut(np.array(lengths, np.int64), most))
    assert [i for first, last in ranges for i in range(first, last)] == list(range(len(lengths)))
    for first, last in ranges:
        assert last == first + 1 or sum(lengths[first:last]) <= most


def test_hugging_face_datasets_reads_ours_and_we_read_theirs(dataset, bring, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    convert(dataset, ConvertOptions(out=tmp_path / "hf"), target_format="hf")
    theirs = datasets.load_from_disk(tmp_path / "hf")
    assert theirs["input_ids"][:] == framed(DOCUMENTS)
    theirs.select([4, 2, 0]).save_to_disk(tmp_path / "back", num_shards=2)
    assert bring(tmp_path / "back")[0] == framed([DOCUMENTS[4], DOCUMENTS[2], DOCUMENTS[0]])
