"""ReadAhead: the same batches; asks while a disk is waited for, in the order in which it helps, and then no more."""

import ctypes
import mmap
import os
import pickle
import time

import numpy as np
import pytest

from minimind_data.dataset.shard import Shard
from minimind_data.windows import read_ahead
from minimind_data.windows.opening import open_windows
from minimind_data.windows.read_ahead import ReadAhead

SHARDS = [[5, 9, 2], [40], [], [3, 3, 3, 3], [17, 2]]


class Recorded:
    """Windows that hold their own number, and a disk that is waited for when a test says so."""

    def __init__(self, monkeypatch, *, cold, shard_sets=()):
        self.log, self.cold, self.reads, self.shard_sets = [], cold, 0, shard_sets
        monkeypatch.setattr(read_ahead, "_disk_reads", lambda: self.reads)
        monkeypatch.setattr(read_ahead, "_THREAD", 1)

    def will_need(self, windows):
        self.log.append(("asked", *windows.tolist()))

    def fetch(self, windows):
        self.log.append(("read", *windows.tolist()))
        self.reads += self.cold
        return {"input_ids": windows}


def numbers(*windows):
    return np.array(windows, np.int64)


def test_while_a_disk_is_waited_for_a_batch_and_a_later_one_are_asked_for_before_it_is_read(monkeypatch):
    windows = Recorded(monkeypatch, cold=True)
    ahead = ReadAhead(windows)
    for first in (0, 2):
        ahead.fetch(numbers(first, first + 1), lambda: numbers(90, 91))
    assert windows.log == [
        ("asked", 0, 1),
        ("read", 0, 1),
        ("asked", 2, 3),
        ("asked", 90, 91),
        ("read", 2, 3),
    ]


def test_nothing_is_asked_for_once_a_batch_came_from_the_page_cache_until_one_does_not(monkeypatch):
    windows = Recorded(monkeypatch, cold=False)
    ahead = ReadAhead(windows)
    for first in range(3):
        windows.cold = first == 2
        ahead.fetch(numbers(first))
    ahead.fetch(numbers(3))
    assert windows.log == [("asked", 0), ("read", 0), ("read", 1), ("read", 2), ("asked", 3), ("read", 3)]


def test_nothing_is_asked_for_where_the_system_does_not_count(monkeypatch):
    windows = Recorded(monkeypatch, cold=True)
    monkeypatch.setattr(read_ahead, "_THREAD", None)
    ahead = ReadAhead(windows)
    monkeypatch.undo()
    ahead.fetch(numbers(0))
    assert windows.log == [("read", 0)]


@pytest.mark.parametrize("layout", ["concat", "pad", "pack"])
def test_batches_are_the_same(make_dataset, layout):
    windows = open_windows(make_dataset(SHARDS), layout=layout, seq_len=8)
    ahead = ReadAhead(windows)
    for number in range(len(windows)):
        batch = numbers(number, len(windows) - 1 - number)
        fetched, plain = ahead.fetch(batch, lambda: numbers(0)), windows.fetch(batch)
        assert fetched.keys() == plain.keys()
        assert all(np.array_equal(fetched[name], plain[name]) for name in plain)
    assert ahead.fetch(numbers(), numbers)["input_ids"].shape == (0, 8)


def asked_beside_scattered_batches(monkeypatch, shards, batch=(0, 1000, 2000), num_batches=50):
    """The tokens that are asked for in order, beside so many batches from a disk."""
    tokens = []
    monkeypatch.setattr(
        Shard, "will_need", lambda shard, start, stop: tokens.extend(shard.tokens[start:stop].tolist())
    )
    ahead = ReadAhead(Recorded(monkeypatch, cold=True, shard_sets=(shards,)))
    for _ in range(num_batches):
        ahead.fetch(numbers(*batch))
    return tokens


def test_all_of_a_dataset_is_asked_for_in_order_where_memory_holds_it(make_dataset, monkeypatch):
    monkeypatch.setattr(read_ahead, "_CHUNK_BYTES", 20)
    shards = make_dataset(SHARDS)
    size = shards.num_tokens * shards.dtype.itemsize
    monkeypatch.setattr(read_ahead, "_available_bytes", lambda: 2 * size)
    tokens = asked_beside_scattered_batches(monkeypatch, shards)
    assert tokens == shards.slice(0, shards.num_tokens).tolist()
    monkeypatch.setattr(read_ahead, "_available_bytes", lambda: 2 * size - 1)
    assert asked_beside_scattered_batches(monkeypatch, shards) == []


def test_rows_that_are_asked_for_may_reach_over_shards_and_to_the_last_byte(make_dataset):
    shards = make_dataset(SHARDS)
    starts = np.arange(shards.num_tokens)
    shards.will_need(starts, np.minimum(starts + 60, shards.num_tokens))
    with pytest.raises(IndexError):
        open_windows(shards, layout="concat", seq_len=8).will_need(numbers(10**6))


def is_in_page_cache(path, place):
    """Whether the page of a byte is in the page cache. It is mapped, not read: reading, even without waiting, would fetch it."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as mapped:
        page = ctypes.c_char.from_buffer(mapped, place // mmap.PAGESIZE * mmap.PAGESIZE)
        flag = ctypes.c_ubyte()
        failed = ctypes.CDLL(None).mincore(ctypes.byref(page), ctypes.c_size_t(1), ctypes.byref(flag))
        del page
    assert not failed
    return bool(flag.value & 1)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs a page cache that can be emptied")
def test_what_is_asked_for_comes_into_the_page_cache_and_what_is_far_from_it_does_not(make_dataset):
    shards = make_dataset([[2**20]])
    windows = open_windows(shards, layout="concat", seq_len=4096)
    near, far = 100 * 4096 * 2, 200 * 4096 * 2  # a shard's ends are looked at when it is opened
    path = shards.folder / f"{shards.manifest.shards[0].name}.bin"
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if is_in_page_cache(path, near) or is_in_page_cache(path, far):
        pytest.skip("this file system keeps its pages")
    windows.will_need(numbers(100, 101))
    deadline = time.monotonic() + 30
    while not is_in_page_cache(path, near):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not is_in_page_cache(path, far)


def test_memory_that_can_be_had_is_some_and_less_than_all():
    assert 0 < read_ahead._available_bytes() < os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE


def test_a_pickle_begins_anew(make_dataset):
    windows = open_windows(make_dataset(SHARDS), layout="concat", seq_len=8)
    ahead = ReadAhead(windows)
    ahead.fetch(numbers(0))
    ahead.fetch(numbers(1))
    again = pickle.loads(pickle.dumps(ahead))
    assert np.array_equal(again.fetch(numbers(1))["input_ids"], windows.fetch(numbers(1))["input_ids"])


def test_the_rest_of_a_dataset_is_asked_for_beside_batches_that_are_scattered_over_it_only(
    make_dataset, monkeypatch
):
    shards = make_dataset(SHARDS)
    for batch in ((5,), range(100, 164), (3, 70, 5, 40), (7, 71)):
        assert asked_beside_scattered_batches(monkeypatch, shards, batch) == []
    tokens = shards.slice(0, shards.num_tokens).tolist()
    assert asked_beside_scattered_batches(monkeypatch, shards, (7, 72)) == tokens
    # Nobody waits for what is asked for beside the first batch, and a stretch of it is enough for the second.
    monkeypatch.setattr(read_ahead, "_CHUNK_BYTES", 20)
    assert asked_beside_scattered_batches(monkeypatch, shards, num_batches=1) == []
    assert asked_beside_scattered_batches(monkeypatch, shards, num_batches=2) == tokens[:10]
    many = [100 * number for number in range(33)]
    assert (
        asked_beside_scattered_batches(monkeypatch, shards, many, num_batches=2) == tokens[:16]
    )  # of the first shard
