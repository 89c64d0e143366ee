"""The plan of layout pack: made once, whole or made again, in the dataset or in the cache."""

import dataclasses
import errno
import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from minimind_data.dataset.format import FormatError
from minimind_data.dataset.plan_file import PACK_FOLDER_NAME, PlanFile
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.dataset.verification import verify
from minimind_data.errors import UserError
from minimind_data.windows import assignment, pack_plan
from minimind_data.windows.pack_plan import PackPlan, open_plan

SHARDS = [[5, 9, 2], [40], [3, 3, 3, 3], [17, 2]]


@pytest.fixture
def shards(make_dataset):
    return make_dataset(SHARDS)


def files_of(shards):
    return sorted(path.name for path in (shards.folder / PACK_FOLDER_NAME).iterdir())


def told_by(plan):
    fragments = None if plan.fragments is None else plan.fragments.tolist()
    return (plan.offsets.tolist(), plan.documents.tolist(), fragments, plan.num_tokens, plan.full_windows)


def test_it_is_made_once(shards):
    said = []
    first = open_plan(shards, 19, "cut", said.append)
    assert said == [f"{shards.folder}: planning which of 10 documents share a window of 19 tokens"]
    (name,) = files_of(shards)
    assert name == f"{shards.manifest.fingerprint[:16]}-19-cut.v1"
    before = (shards.folder / PACK_FOLDER_NAME / name).stat()
    again = open_plan(ShardSet.open(shards.folder), 19, "cut", said.append)
    assert told_by(again) == told_by(first)
    assert (shards.folder / PACK_FOLDER_NAME / name).stat() == before
    assert len(said) == 1
    open_plan(shards, 19, "fragment")
    open_plan(shards, 20, "cut")
    assert len(files_of(shards)) == 3
    assert not verify(shards.folder).problems


def test_the_file_is_what_its_format_says(shards):
    open_plan(shards, 19, "fragment")
    (path,) = (shards.folder / PACK_FOLDER_NAME).iterdir()
    content = path.read_bytes()
    assert content[:8] == b"MMPACK\0\0"
    assert content[16:48].hex() == shards.manifest.fingerprint
    assert content[8:12] == b"\1\0\0\0"
    assert np.frombuffer(content, "<u8", 3, 48).tolist() == [10, 87, 19]
    assert list(content[72:80]) == [1, 4, 4, 0, 0, 0, 0, 0]
    # K, S, tokens in windows (two of them twice), windows without PAD, long documents, tokens in no window
    assert np.frombuffer(content, "<u8", 6, 80).tolist() == [5, 12, 89, 3, 1, 0]
    assert np.frombuffer(content, "<i8", 6, 128).tolist() == [0, 3, 5, 6, 7, 12]
    assert np.frombuffer(content, "<u4", 12, 176).tolist() == [0, 1, 3, 2, 8, 3, 3, 4, 5, 6, 7, 9]
    assert np.frombuffer(content, "<u4", 12, 224).tolist() == [0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert len(content) == 272


def test_the_plan_does_not_depend_on_shards_or_blocks(make_dataset, monkeypatch):
    source = np.random.default_rng(0)
    lengths = np.minimum(np.exp(source.normal(3, 1, 700)).astype(int) + 2, 200).tolist()
    whole = told_by(open_plan(make_dataset([lengths], name="whole"), 64, "fragment"))
    monkeypatch.setattr(assignment, "_BLOCK_DOCUMENTS", 7)
    monkeypatch.setattr(assignment, "_BLOCK_FRAGMENTS", 5)
    parts = make_dataset([lengths[:100], [], lengths[100:101], lengths[101:]], name="parts")
    assert told_by(open_plan(parts, 64, "fragment")) == whole


def test_the_order_of_windows_is_that_of_plans_made_before(make_dataset, monkeypatch):
    """A plan that is missing is made again in the middle of a run, which must then see the same windows."""
    lengths = [(7 * i * i + 3 * i) % 61 + 2 for i in range(900)]
    shards = make_dataset([lengths[:500], lengths[500:]])
    assert order_of(open_plan(shards, 48, "fragment")) == "f634de7cacf0e07a"
    assert (assignment._BLOCK_WINDOWS, assignment._BLOCK_SEGMENTS, assignment._PLACE_BITS) == (
        2**16,
        2**22,
        24,
    )
    monkeypatch.setattr(assignment, "_BLOCK_WINDOWS", 50)
    assert order_of(open_plan(shards, 49, "cut")) == "af99fa8603a5d263"
    monkeypatch.setattr(assignment, "_BLOCK_SEGMENTS", 70)
    assert order_of(open_plan(shards, 50, "drop")) == "28cf75dbf064b647"


def order_of(plan):
    """The beginning of a hash of which documents stand in which window."""
    arrays = [plan.offsets.astype("<i8"), plan.documents.astype("<i8")]
    arrays += [] if plan.fragments is None else [plan.fragments.astype("<i8")]
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


def test_windows_follow_the_corpus(make_dataset, monkeypatch):
    monkeypatch.setattr(assignment, "_BLOCK_WINDOWS", 10)
    source = np.random.default_rng(0)
    lengths = source.integers(2, 32, 4000).tolist()
    plan = open_plan(make_dataset([lengths]), 64, "cut")
    middles = np.add.reduceat(plan.documents.astype(np.int64), plan.offsets[:-1]) / np.diff(plan.offsets)
    places = np.arange(plan.num_windows) / plan.num_windows
    assert np.corrcoef(middles, places)[0, 1] > 0.9
    # Long documents do not always come first in their windows.
    first = np.array(lengths)[plan.documents[plan.offsets[:-1]]]
    assert abs(first.mean() - np.mean(lengths)) < 2


@pytest.mark.parametrize("long_documents", ["cut", "fragment"])
def test_any_damage_makes_it_again(shards, long_documents):
    wanted = told_by(open_plan(shards, 19, long_documents))
    (path,) = (shards.folder / PACK_FOLDER_NAME).iterdir()
    whole = path.read_bytes()
    damaged = [b"", whole[:100], whole[:-1], whole + b"\0", bytes(len(whole))]
    damaged += [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(len(whole))]
    for content in damaged:
        path.write_bytes(content)
        assert PackPlan.read(path, shards) is None
        path.unlink()  # a map of the damaged file may still be there, and must not see the new one
    path.write_bytes(damaged[-1])
    said = []
    assert told_by(open_plan(shards, 19, long_documents, said.append)) == wanted
    assert path.read_bytes() == whole
    assert len(said) == 1


def test_another_datasets_plan_is_none(make_dataset, shards):
    other = make_dataset([[5, 9, 2, 30]], name="other")
    open_plan(other, 19, "cut")
    (path,) = (other.folder / PACK_FOLDER_NAME).iterdir()
    open_plan(shards, 19, "cut")
    (mine,) = (shards.folder / PACK_FOLDER_NAME).iterdir()
    mine.write_bytes(path.read_bytes())
    assert PackPlan.read(mine, shards) is None
    path.rename(path.with_name(path.name.replace("-19-", "-20-")))
    assert PackPlan.read(path.with_name(path.name.replace("-19-", "-20-")), other) is None


def test_plans_of_what_the_dataset_was_go(shards):
    folder = shards.folder / PACK_FOLDER_NAME
    folder.mkdir()
    old, foreign = folder / "0123456789abcdef-19-cut.v1", folder / "notes.txt"
    old.write_bytes(b"old")
    foreign.write_bytes(b"mine")
    open_plan(shards, 19, "cut")
    assert not old.exists()
    assert foreign.exists()


def test_what_a_killed_process_left_goes(shards):
    folder = shards.folder / PACK_FOLDER_NAME
    folder.mkdir()
    name = f"{shards.manifest.fingerprint[:16]}-19-cut.v1"
    (folder / f"{name}.12345.partial").write_bytes(b"half")
    (folder / f"{name}.lock").write_bytes(b"")
    open_plan(shards, 19, "cut")
    assert files_of(shards) == [name]


def test_a_plan_that_fails_leaves_nothing(shards, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("on the way")
        yield

    monkeypatch.setattr(pack_plan, "assign_documents", fail)
    with pytest.raises(RuntimeError):
        open_plan(shards, 19, "cut")
    assert files_of(shards) == []


def test_others_wait_for_the_one_that_plans(shards, monkeypatch):
    begun, waiting, calls = threading.Event(), threading.Event(), []

    def slow(*arguments):
        calls.append(arguments)
        begun.set()
        assert waiting.wait(60)
        return assignment.count_segments(*arguments)

    def hear(sentence):
        said.append(sentence)
        if "waiting" in sentence:
            waiting.set()

    said = []
    monkeypatch.setattr(pack_plan, "count_segments", slow)
    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(open_plan, shards, 19, "cut")
        assert begun.wait(60)
        two = threads.submit(open_plan, shards, 19, "cut", hear)
        assert told_by(one.result(60)) == told_by(two.result(60))
    assert len(calls) == 1
    assert len(said) == 1
    assert said[0].endswith("another process is planning these windows; waiting for it")
    assert len(files_of(shards)) == 1


@pytest.fixture
def read_only(monkeypatch):
    """Make folders below these read-only, for `Path.mkdir`."""
    folders = []
    really = Path.mkdir

    def mkdir(self, *arguments, **settings):
        if any(folder in self.parents for folder in folders):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        really(self, *arguments, **settings)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    return folders


def test_a_read_only_dataset_has_its_plan_in_the_cache(shards, read_only, monkeypatch, tmp_path):
    read_only.append(shards.folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    said = []
    first = open_plan(shards, 19, "cut", said.append)
    cache = tmp_path / "cache" / "minimind-pipeline" / "packing"
    assert (
        said[0]
        == f"{shards.folder}: cannot be written (Read-only file system); the plan of its windows goes to {cache}"
    )
    assert len(list(cache.iterdir())) == 1
    assert not (shards.folder / PACK_FOLDER_NAME).exists()
    assert told_by(open_plan(shards, 19, "cut", said.append)) == told_by(first)
    assert len(said) == 2


@pytest.mark.parametrize("told", [None, "", "relative/cache"])
def test_without_a_word_the_cache_is_at_home(shards, read_only, monkeypatch, tmp_path, told):
    read_only.append(shards.folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if told is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", told)
    open_plan(shards, 19, "cut")
    assert len(list((tmp_path / "home" / ".cache" / "minimind-pipeline" / "packing").iterdir())) == 1


def test_no_place_for_a_plan_is_one_sentence(shards, read_only, monkeypatch, tmp_path):
    read_only += [shards.folder, tmp_path / "cache"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(
        UserError, match=r"cache.*cannot be written \(Read-only file system\), nor can .*XDG_CACHE_HOME"
    ):
        open_plan(shards, 19, "cut")


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room is reserved by posix_fallocate")
@pytest.mark.parametrize(("number", "full"), [(errno.ENOSPC, True), (errno.EOPNOTSUPP, False)])
def test_a_full_disk_is_one_sentence_and_no_reserve_is_none(shards, monkeypatch, number, full):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    if full:
        with pytest.raises(UserError, match="the disk is full; .* run the same command again"):
            open_plan(shards, 19, "cut")
        assert files_of(shards) == []
    else:
        assert open_plan(shards, 19, "cut").num_windows == 4


def test_documents_of_several_sequences_are_refused(shards):
    first, *others = shards.manifest.shards
    entries = (dataclasses.replace(first, written=dataclasses.replace(first.written, documents=1)), *others)
    with pytest.raises(UserError, match="of several sequences each, which layout pack does not know"):
        open_plan(ShardSet(shards.folder, dataclasses.replace(shards.manifest, shards=entries)), 19, "cut")


@pytest.mark.parametrize("wrong", [4, -5])
def test_a_damaged_index_is_named(shards, wrong):
    path = shards.folder / "text-00000.idx"
    content = bytearray(path.read_bytes())
    content[34:38] = wrong.to_bytes(4, "little", signed=True)
    path.write_bytes(content)
    with pytest.raises(
        FormatError, match=r"text-00000\.idx: damaged \(its lengths do not sum up to 16 tokens\)"
    ):
        open_plan(shards, 19, "cut")


@pytest.mark.parametrize(("bytes_of_a_number", "is_read"), [(8, True), (2, False), (7, False), (16, False)])
def test_numbers_of_documents_may_take_8_bytes_and_no_other_size(shards, bytes_of_a_number, is_read):
    """As in a dataset of more than 2^32 documents; a plan of this one is written anew in that width, checksum and all."""
    open_plan(shards, 19, "fragment")
    (path,) = (shards.folder / PACK_FOLDER_NAME).iterdir()
    plan = PlanFile.read(path, shards.manifest)
    documents, offsets, fragments = plan.documents.tolist(), plan.offsets.tolist(), plan.fragments.tolist()
    wide = b"".join(number.to_bytes(bytes_of_a_number, "little") for number in documents)
    content = bytes(128) + plan.offsets.tobytes() + wide + plan.fragments.tobytes()
    header = plan.header._replace(document_bytes=bytes_of_a_number)
    path.write_bytes(header.pack(np.frombuffer(content, np.uint8)) + content[128:])
    again = PackPlan.read(path, shards)
    if not is_read:
        assert again is None
        return
    assert again.documents.tolist() == documents
    assert (again.offsets.tolist(), again.fragments.tolist()) == (offsets, fragments)
    assert PlanFile.read(path, shards.manifest).problem() is None
