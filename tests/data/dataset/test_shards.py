"""ShardSet: the stream is the shards end to end; a shard that is not as the manifest says is refused by name."""

import pickle
import struct
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_data.dataset.format import FormatError, IndexHeader, Manifest
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.windows.opening import open_windows
from tests.helpers.datasets import write_dataset

SHARDS = [[5, 9, 2], [40], [3, 3, 3, 3], [17, 2]]


def stream_of(shards: ShardSet) -> np.ndarray:
    return np.concatenate([shard.tokens for shard in shards])


def test_the_files_are_what_the_specification_says(make_dataset):
    shards = make_dataset([[4, 3]])
    assert (shards.folder / "text-00000.bin").read_bytes() == struct.pack("<7H", 1, 3, 4, 2, 1, 5, 2)
    wanted = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 3) + struct.pack("<2i", 4, 3)
    wanted += struct.pack("<2q", 0, 8) + struct.pack("<3q", 0, 1, 2)
    assert (shards.folder / "text-00000.idx").read_bytes() == wanted


def test_a_large_vocabulary_takes_int32(make_dataset):
    shards = make_dataset([[10]], vocab_size=65_537)
    assert shards.shard(0).tokens.dtype == np.dtype("<i4")
    assert (shards.folder / "text-00000.idx").read_bytes()[17] == 4
    assert make_dataset([[10]], vocab_size=65_536, name="other").shard(0).tokens.dtype == np.dtype("<u2")


def test_rows_are_slices_of_the_stream(make_dataset):
    shards = make_dataset(SHARDS)
    stream = stream_of(shards)

    @settings(deadline=None, max_examples=200)
    @given(width=st.integers(1, 87), data=st.data())
    def check(width, data):
        starts = data.draw(st.lists(st.integers(0, len(stream) - width), max_size=20))
        rows = shards.rows(np.array(starts, np.int64), width)
        assert rows.tolist() == [stream[start : start + width].tolist() for start in starts]

    check()


def test_rows_outside_the_stream_are_refused(make_dataset):
    shards = make_dataset(SHARDS)
    for start in (-1, shards.num_tokens - 3):
        with pytest.raises(IndexError):
            shards.rows(np.array([0, start]), 4)


def test_names_and_offsets_invert(make_dataset):
    shards = make_dataset(SHARDS)
    for token in range(shards.num_tokens):
        assert shards.token_at(*shards.name_and_offset(token)) == token


def test_unknown_places_are_named(make_dataset):
    shards = make_dataset(SHARDS)
    with pytest.raises(ValueError, match="no shard named 'nope'; its 4 shards are text-00000"):
        shards.token_at("nope", 0)
    with pytest.raises(ValueError, match="text-00001 has tokens 0 to 39, and none at 40"):
        shards.token_at("text-00001", 40)


def test_opening_reads_no_shard(make_dataset):
    folder = make_dataset(SHARDS).folder
    for path in [*folder.glob("*.bin"), *folder.glob("*.idx")]:
        path.unlink()
    assert ShardSet.open(folder).num_tokens == 87


def test_a_set_pickles_as_its_folder(make_dataset):
    shards = make_dataset(SHARDS)
    data = pickle.dumps(shards)
    assert len(data) < 4000
    assert stream_of(pickle.loads(data)).tolist() == stream_of(shards).tolist()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (
            lambda folder: _cut(folder / "text-00001.bin"),
            r"text-00001.bin: 78 bytes, where the manifest says 80",
        ),
        (
            lambda folder: _cut(folder / "text-00001.idx"),
            r"text-00001.idx: .* bytes, where the manifest says",
        ),
        (lambda folder: _flip(folder / "text-00001.idx", 3), r"text-00001.idx: not a shard index"),
        (
            lambda folder: _flip(folder / "text-00001.idx", 9),
            r"text-00001.idx: the index header says version",
        ),
        (
            lambda folder: _flip(folder / "text-00001.idx", 17),
            r"text-00001.idx: the index header says version",
        ),
        (
            lambda folder: _flip(folder / "text-00001.bin", 0),
            r"text-00001.bin: begins with token .* another dataset",
        ),
        (lambda folder: (folder / "text-00001.bin").unlink(), r"text-00001.bin: missing"),
    ],
)
def test_a_damaged_shard_is_refused_by_name_when_it_is_touched(make_dataset, damage, complaint):
    folder = make_dataset(SHARDS).folder
    damage(folder)
    shards = ShardSet.open(folder)
    assert shards.shard(0).tokens[0] == 1
    with pytest.raises(FormatError, match=complaint) as error:
        shards.shard(1)
    assert "mm-data tokenize" in str(error.value)


def test_another_tokenizer_is_refused_at_once(make_dataset):
    folder = make_dataset(SHARDS).folder
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match="tokenizer.json: its SHA-256 is"):
        ShardSet.open(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": 1}', '{"format_version": 99}'])
def test_a_broken_manifest_is_named(make_dataset, text):
    folder = make_dataset(SHARDS).folder
    (folder / "manifest.json").write_text(text)
    with pytest.raises(FormatError, match=r"manifest\.json"):
        ShardSet.open(folder)


def test_no_dataset_says_how_to_make_one(tmp_path):
    with pytest.raises(FormatError, match="no dataset .* `mm-data tokenize`"):
        ShardSet.open(tmp_path)


def test_the_manifest_reads_back(make_dataset):
    shards = make_dataset(SHARDS)
    assert Manifest.read(shards.folder) == shards.manifest


def test_an_index_header_knows_its_file_size(make_dataset):
    shards = make_dataset(SHARDS)
    for index, entry in enumerate(shards.manifest.shards):
        header = IndexHeader(
            dtype="uint16", num_sequences=entry.written.sequences, num_documents=entry.written.documents
        )
        assert header.file_bytes == (shards.folder / f"text-{index:05d}.idx").stat().st_size


@pytest.fixture
def restless_threads():
    """Change threads as often as the interpreter can, so that a race has its chance."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-7)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless_threads")
def test_threads_may_read_while_others_map(make_dataset):
    shards = make_dataset([[20 + shard % 7] * 3 for shard in range(120)])
    wanted = np.concatenate([shard.tokens for shard in shards])
    width, errors = 5, []
    for _ in range(15):
        fresh = ShardSet.open(shards.folder)

        def read(seed, fresh=fresh):
            rng = np.random.default_rng(seed)
            for _ in range(30):
                starts = rng.integers(0, len(wanted) - width, 8)
                rows = fresh.rows(starts, width)
                if not np.array_equal(rows, np.lib.stride_tricks.sliding_window_view(wanted, width)[starts]):
                    errors.append((starts, rows))
                owners = np.searchsorted(fresh.document_starts, starts % len(shards), side="right") - 1
                first, lengths = fresh.sequence_spans(owners, np.zeros(len(owners), np.int64))
                if not np.array_equal(first, fresh.token_starts[owners]):
                    errors.append((first, lengths))

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


def test_an_index_that_points_outside_its_shard_is_named(make_dataset):
    folder = make_dataset([[5, 6, 7], [8, 9]]).folder
    index = bytearray((folder / "text-00000.idx").read_bytes())
    index[34 + 3 * 4 + 8 + 7] ^= 0x40  # a high bit of the second offset
    (folder / "text-00000.idx").write_bytes(index)
    windows = open_windows(ShardSet.open(folder), layout="pad", seq_len=4)
    assert windows.fetch(np.array([0, 3]))["input_ids"].shape == (2, 4)
    with pytest.raises(FormatError, match=r"text-00000.idx: damaged \(sequence 1 lies outside the shard\)"):
        windows.fetch(np.array([0, 1]))


def test_every_learned_token_is_counted_in_blocks_of_any_size(tmp_path, monkeypatch):
    masks = [[1, 0, 1], [1], [0, 0, 0, 1], [1, 1, 1, 1, 1]]
    sequences = [(np.arange(len(mask)), np.array(mask, np.uint8)) for mask in masks]
    shards = write_dataset(tmp_path / "sft", [sequences[:2], sequences[2:]], kind="sft")
    for size in (1, 2, 3, 4, 100):
        monkeypatch.setattr("minimind_data.dataset.shard_set._TOKENS_PER_COUNT", size)
        assert shards.count_learned() == 9
    text = write_dataset(tmp_path / "text", [[[1, 5, 2]], [[1, 2]]])
    assert text.count_learned() == 5
