"""Token files as other projects write them: what is in them comes in, and what they cannot mean is refused by name."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimind_data.errors import UserError

BOS, EOS, PAD = 1, 2, 0
VOCAB = 50
DOCUMENTS = [[5, 6, 7], [8], [9, 10, 3, 49], [11] * 30, [12, 13]]


def framed(documents):
    return [[BOS, *document, EOS] for document in documents]


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


@pytest.mark.parametrize(
    ("dtype", "code"), [("<u1", 1), ("<i1", 2), ("<i2", 3), ("<i4", 4), ("<i8", 5), ("<u2", 8)]
)
def test_megatron_dtypes_and_several_sequences(bring, tmp_path, dtype, code, write_megatron):
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


def test_what_megatron_cannot_mean(bring, tmp_path, write_megatron):
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
    refused("its index says 80", short)
    bin_path.write_bytes(whole)
    index = bytearray(idx_path.read_bytes())
    idx_path.write_bytes(index[:-1])
    refused("s.idx: 141 bytes, where its header says 142", short)
    index[34 + 4 * 5 + 8] += 2  # the second sequence's offset
    idx_path.write_bytes(index)
    refused("are not end to end", short)
    index[34 + 4 * 5 + 8] -= 2
    index[-8] -= 1  # the last document ends before the last sequence
    idx_path.write_bytes(index)
    refused("do not follow one another", short)
    idx_path.unlink()
    refused("its content does not show its format", bin_path)
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


def test_what_a_stream_cannot_mean(bring, tmp_path, write_megatron):
    path = write_llmc(tmp_path / "parts" / "a.bin", [40, 5, 6])
    with pytest.raises(UserError, match="a.bin: the id 1, which divides documents, is nowhere in it"):
        bring(path)
    with pytest.raises(UserError, match="begins with 20240520, 1, where this format has 20240801, 7"):
        bring(path, kind="llmc-llama3")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="1,029 bytes, where its header says 3 tokens, which are 1,030 bytes"):
        bring(path)
    with pytest.raises(UserError, match="no whole number of 2-byte ids"):
        bring(path, kind="nanogpt")
    with pytest.raises(UserError, match="leave out `separator_id`"):
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
    with pytest.raises(UserError, match="x.ds.index: the ends of documents 0 to 3 do not increase"):
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
def test_an_id_beyond_the_vocabulary_is_named(bring, tmp_path, bad, write_megatron):
    stem = write_megatron(tmp_path / "x", [[5, 6], [7, bad]], "<i4", 4)
    with pytest.raises(UserError, match=rf"x.bin: token 3 is {bad}, where the tokenizer has ids 0 to 49"):
        bring(stem)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("offsets", [[0, 3, 1, 4], [0, 2, 3, 2**20], [-1, 2, 3, 4]])
def test_lists_that_are_not_made_of_the_values_are_damage(bring, tmp_path, offsets):
    folder = write_hf(tmp_path / "saved", [[[5, 6, 7], [8], [9]]])
    path = folder / "data.arrow"
    whole = path.read_bytes()
    right = np.array([0, 3, 4, 5], "<i4").tobytes()
    assert whole.count(right) == 1
    path.write_bytes(whole.replace(right, np.array(offsets, "<i4").tobytes()))
    with pytest.raises(UserError, match=r"data\.arrow: damaged or not of this format"):
        bring(folder)
