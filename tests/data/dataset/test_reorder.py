"""merge and shuffle: every document is there once, in an order that can be told in advance."""

import contextlib
import dataclasses
import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minimind_data.dataset import shuffling as shuffle_module
from minimind_data.dataset.format import FormatError, Manifest
from minimind_data.dataset.merging import MergeOptions, merge
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.dataset.shuffling import ShuffleOptions, fetch, order, shuffle
from minimind_data.dataset.staging import unique_names
from minimind_data.dataset.verification import verify
from minimind_data.errors import UserError
from minimind_data.permutation import Permutation

SHARDS = [[5, 3, 9], [4], [30, 6, 3, 3]]


def documents_of(shards):
    found = []
    for shard in shards:
        starts = shard.offsets // shards.dtype.itemsize
        found += [
            tuple(shard.tokens[start : start + length])
            for start, length in zip(starts, shard.lengths, strict=True)
        ]
    return found


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_merged_datasets_stand_one_behind_the_other(make_dataset, tmp_path):
    a, b = make_dataset(SHARDS, name="a"), make_dataset([[7, 8], [3]], name="b")
    made = merge([a.folder, b.folder, a.folder], MergeOptions(out=tmp_path / "c"))
    whole = ShardSet.open(tmp_path / "c")
    assert documents_of(whole) == documents_of(a) + documents_of(b) + documents_of(a)
    assert not verify(tmp_path / "c").problems
    assert [entry.name for entry in made.shards] == [
        *(f"text-0000{i}" for i in range(3)),
        "text-00000~2",
        "text-00001~2",
        "text-00000~3",
        "text-00001~3",
        "text-00002~2",
    ]
    assert [entry.origin.input for entry in made.shards] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert made.inputs == (*a.manifest.inputs, *b.manifest.inputs, *a.manifest.inputs)
    assert (tmp_path / "c" / "text-00000.bin").stat().st_nlink == 3


def test_a_merge_is_the_same_every_time_linked_or_copied(make_dataset, tmp_path, monkeypatch):
    folders = [make_dataset(SHARDS, name="a").folder, make_dataset([[7, 8], [3]], name="b").folder]
    merge(folders, MergeOptions(out=tmp_path / "linked"))
    merge(folders, MergeOptions(out=tmp_path / "copied", copy=True))
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
    merge(folders, MergeOptions(out=tmp_path / "elsewhere"))
    assert files_of(tmp_path / "linked") == files_of(tmp_path / "copied") == files_of(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "text-00000.bin").stat().st_nlink == 1
    merge(folders[::-1], MergeOptions(out=tmp_path / "turned"))
    assert Manifest.read(tmp_path / "turned").fingerprint != Manifest.read(tmp_path / "linked").fingerprint


def test_merging_reports_every_shard_once(make_dataset, tmp_path):
    folders = [make_dataset(SHARDS, name="a").folder, make_dataset([[7, 8], [3]], name="b").folder]
    steps, reports = [], []

    def progress(title, num_bytes):
        steps.append((title, num_bytes))
        return contextlib.nullcontext(lambda *done: reports.append(done))

    manifest = merge(folders, MergeOptions(out=tmp_path / "out"), progress=progress)
    assert steps == [("merge", manifest.num_bytes)]
    assert reports == [(entry.written.bytes, entry.written.tokens) for entry in manifest.shards]


def test_datasets_that_do_not_go_together_are_refused_with_both_sides(make_dataset, tmp_path):
    a, b = make_dataset(SHARDS, name="a"), make_dataset([[4]], name="b", vocab_size=70_000)
    match = "b: cannot be merged with .*a: dtype is uint16 there and int32 here; tokenizer is one of 6,400 entries, BOS 1"
    with pytest.raises(UserError, match=match):
        merge([a.folder, b.folder], MergeOptions(out=tmp_path / "c"))
    with pytest.raises(UserError, match="at least two datasets"):
        merge([a.folder], MergeOptions(out=tmp_path / "c"))
    path = a.folder / "text-00001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(FormatError, match="text-00001.bin: 6 bytes, where the manifest says 8"):
        merge([a.folder, a.folder], MergeOptions(out=tmp_path / "c"))
    path.unlink()
    with pytest.raises(FormatError, match="text-00001.bin: missing"):
        merge([a.folder, a.folder], MergeOptions(out=tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def test_what_was_set_aside_stays_known(make_dataset, tmp_path):
    a, b = make_dataset(SHARDS, name="a").folder, make_dataset([[4]], name="b").folder
    for folder, lines in ((a, b"first\n"), (b, b"second\n")):
        (folder / "set-aside.jsonl").write_bytes(lines)
        told = hashlib.sha256(lines).hexdigest()
        manifest = dataclasses.replace(Manifest.read(folder), set_aside=1, set_aside_sha256=told)
        (folder / "manifest.json").write_text(manifest.to_json())
    assert merge([a, b], MergeOptions(out=tmp_path / "m")).set_aside == 2
    shuffle(tmp_path / "m", ShuffleOptions(out=tmp_path / "s"))
    for name in ("m", "s"):
        assert (tmp_path / name / "set-aside.jsonl").read_bytes() == b"first\nsecond\n"
        assert not verify(tmp_path / name).problems
    (a / "set-aside.jsonl").write_bytes(b"firsd\n")
    with pytest.raises(FormatError, match="set-aside.jsonl: SHA-256"):
        merge([a, b], MergeOptions(out=tmp_path / "n"))
    (a / "set-aside.jsonl").unlink()
    with pytest.raises(FormatError, match="set-aside.jsonl: missing"):
        shuffle(a, ShuffleOptions(out=tmp_path / "n"))
    assert not (tmp_path / "n").exists()


@given(names=st.lists(st.sampled_from(["a", "b", "a~2", "a~2~2"])))
def test_names_are_unique_and_the_first_keeps_its_own(names):
    made = unique_names(names)
    assert len(set(made)) == len(names)
    for index, name in enumerate(names):
        assert made[index] == name or name in names[:index]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shards=st.lists(st.lists(st.integers(3, 40), min_size=1, max_size=30), min_size=1, max_size=5),
    seed=st.integers(0, 2**64 - 1),
    shard_bytes=st.integers(1, 500),
)
def test_every_document_stands_in_a_shuffle_exactly_once(
    make_dataset, tmp_path_factory, shards, seed, shard_bytes
):
    base = tmp_path_factory.mktemp("shuffle")
    source = make_dataset(shards, name=f"{base.name}-source")
    made = shuffle(source.folder, ShuffleOptions(out=base / "out", seed=seed, shard_bytes=shard_bytes))
    assert not verify(base / "out").problems
    found = documents_of(ShardSet.open(base / "out"))
    # Ids count on through the dataset, so all documents of more than BOS and EOS are different
    assert sorted(found) == sorted(documents_of(source))
    wanted = np.concatenate(list(order(source.num_documents, seed)))
    assert found == [documents_of(source)[number] for number in wanted]
    for entry in made.shards:
        assert entry.written.bytes <= shard_bytes or entry.written.documents == 1
    for entry, following in itertools.pairwise(made.shards):
        first = ShardSet.open(base / "out").shard(made.shards.index(following)).lengths[0]
        assert (
            entry.written.bytes + first * source.dtype.itemsize > shard_bytes
        )  # it could not have been longer


def test_a_shuffle_is_the_same_every_time_however_it_is_cut(make_dataset, tmp_path, monkeypatch):
    source = make_dataset(SHARDS).folder
    shuffle(source, ShuffleOptions(out=tmp_path / "a", seed=3, shard_bytes=20))
    shuffle(source, ShuffleOptions(out=tmp_path / "b", seed=3, shard_bytes=20))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    monkeypatch.setattr(shuffle_module, "_FETCH_BYTES", 12)
    monkeypatch.setattr(shuffle_module, "_GATHER_TOKENS", 4)
    monkeypatch.setattr(shuffle_module, "_LONG_DOCUMENT", 6)
    monkeypatch.setattr(shuffle_module.order, "__defaults__", (2,))  # of documents at once
    shuffle(source, ShuffleOptions(out=tmp_path / "c", seed=3, shard_bytes=20))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "c")
    other = shuffle(source, ShuffleOptions(out=tmp_path / "d", seed=3))
    assert other.fingerprint == Manifest.read(tmp_path / "a").fingerprint
    assert shuffle(source, ShuffleOptions(out=tmp_path / "e", seed=4)).fingerprint != other.fingerprint


def test_a_shuffle_names_its_source_by_its_tokens(make_dataset, tmp_path):
    source = make_dataset(SHARDS)
    made = shuffle(source.folder, ShuffleOptions(out=tmp_path / "a", shard_bytes=20))
    stream = b"".join((source.folder / f"{entry.name}.bin").read_bytes() for entry in source.manifest.shards)
    (told,) = made.inputs
    assert (told.path, told.bytes) == (str(source.folder), len(stream))
    assert told.sha256 == hashlib.sha256(stream).hexdigest()
    assert {
        (entry.origin.input, entry.origin.input_start, entry.origin.input_stop) for entry in made.shards
    } == {(0, 0, len(stream))}
    assert made.options["shuffled_from"] == source.manifest.fingerprint


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_damaged_source_is_never_shuffled(make_dataset, tmp_path, suffix):
    folder = make_dataset(SHARDS).folder
    path = folder / f"text-00002{suffix}"
    data = bytearray(path.read_bytes())
    data[34 if suffix == ".idx" else 4] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match=f"text-00002{suffix}: SHA-256 .* it is damaged"):
        shuffle(folder, ShuffleOptions(out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("num_documents", [1, 2, 3, 255, 256, 257, 4095, 4096, 4097])
@pytest.mark.parametrize("at_once", [1, 7, 64, 2**21])
def test_an_order_is_a_permutation_whatever_is_held_at_once(num_documents, at_once):
    pieces = list(order(num_documents, 5, max(at_once, num_documents // 50)))
    found = np.concatenate(pieces)
    assert sorted(found) == list(range(num_documents))
    assert found.tolist() == np.concatenate(list(order(num_documents, 5))).tolist()


GOLDEN = {
    (12, 42): [10, 3, 2, 11, 8, 1, 4, 0, 5, 6, 7, 9],
    (300, 7): [38, 181, 203, 141, 37, 255, 30, 291, 9, 45, 183, 236],
    (10**6, 3): [756791, 588063, 16815, 853724, 805437, 332456, 363075, 786929, 906445, 53057, 78468, 285196],
}


@pytest.mark.parametrize(("key", "numbers"), GOLDEN.items())
def test_the_order_is_pinned(key, numbers):
    assert np.concatenate(list(order(*key)))[: len(numbers)].tolist() == numbers


def test_a_dataset_that_was_shuffled_in_the_first_order_opens(make_dataset, tmp_path):
    numbers = [10, 9, 6, 2, 1, 5, 0, 7, 3, 4, 11, 8]  # of 12 documents with seed 42
    source = make_dataset([range(3, 15)], name="source").manifest
    old = make_dataset([[3 + number for number in numbers]], name="old")
    recorded = {"shuffled_from": source.fingerprint, "seed": 42, "shard_bytes": 64 * 2**20}
    manifest = dataclasses.replace(old.manifest, options=recorded)
    (old.folder / "manifest.json").write_text(manifest.to_json())
    assert not verify(old.folder).problems
    opened = ShardSet.open(old.folder)
    assert [len(document) - 3 for document in documents_of(opened)] == numbers
    again = shuffle(old.folder, ShuffleOptions(out=tmp_path / "again"))
    assert again.options == {**recorded, "shuffled_from": manifest.fingerprint, "order_version": 2}
    assert [len(document) - 3 for document in documents_of(ShardSet.open(tmp_path / "again"))] == [
        numbers[place] for place in GOLDEN[12, 42]
    ]


def test_the_work_grows_with_the_number_of_documents(make_dataset, tmp_path, monkeypatch):
    computed = []

    class Counting(Permutation):
        def __getitem__(self, index):
            computed.append(len(index))
            return super().__getitem__(index)

    monkeypatch.setattr(shuffle_module, "Permutation", Counting)
    monkeypatch.setattr(shuffle_module.order, "__defaults__", (50,))  # of documents at once
    for num_documents in (300, 2400):
        source = make_dataset([[4] * num_documents], name=f"source-{num_documents}").folder
        computed.clear()
        shuffle(source, ShuffleOptions(out=tmp_path / f"out-{num_documents}"))
        assert sum(computed) == num_documents
        assert max(computed) == 50


def test_the_order_looks_random():
    n = 2**16
    orders = [np.concatenate(list(order(n, seed))) for seed in (0, 1, 2, 2**63)]
    for one in orders:
        steps = np.diff(one)
        # A random order has a step of 1 about once, as many even steps as odd, and moves by n/3 on average
        assert (np.abs(steps) == 1).sum() < 16
        assert abs((steps % 2).mean() - 0.5) < 0.01
        assert abs(np.abs(one - np.arange(n)).mean() / n - 1 / 3) < 0.01
        assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 0.02
    for one, other in itertools.pairwise(orders):
        assert (one == other).sum() < 16
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.02


def test_fetch_takes_documents_in_any_order_and_more_than_once(make_dataset, monkeypatch):
    source = make_dataset(SHARDS)
    lengths = np.concatenate([np.array(one, np.int64) for one in SHARDS])
    starts = np.cumsum(lengths) - lengths
    wanted = [7, 0, 3, 3, 4, 0]
    for bound in (1, 5, 2**12):
        monkeypatch.setattr(shuffle_module, "_LONG_DOCUMENT", bound)
        got = fetch(source, starts[wanted], lengths[wanted])
        documents = documents_of(source)
        assert got.tolist() == [token for number in wanted for token in documents[number]]


def test_more_shards_than_a_process_may_have_open(make_dataset, tmp_path):
    resource = pytest.importorskip("resource")
    source = make_dataset([[3, 4]] * 60).folder
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 400:
        pytest.skip("the system allows too few open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        made = shuffle(source, ShuffleOptions(out=tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert made.num_documents == 120
