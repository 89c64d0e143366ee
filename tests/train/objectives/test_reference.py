"""The reference's log-probabilities beside the shards: made once, whole, and the right ones."""

import json
import multiprocessing
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minimind_data.dataset.format import IGNORED
from minimind_data.errors import UserError
from minimind_data.files import sha256_of
from minimind_train.batches.trimming import COLUMNS
from minimind_train.model.config import ModelConfig
from minimind_train.model.transformer import MiniMind, initialize
from minimind_train.objectives import reference
from minimind_train.objectives.preference import REFERENCE, log_probs_of_pairs
from minimind_train.objectives.reference import (
    REFERENCE_FOLDER_NAME,
    Reference,
    ReferencedWindows,
    reference_log_probs,
)
from tests.helpers.mutations import write_with_checksum
from tests.helpers.runs import Said

SHAPE = ModelConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=40
)
OF = Reference(weights="w" * 64, seq_len=8, dtype="fp32")
NUM_PAIRS = 23
LENGTH = 2 * COLUMNS + 8


class PairsInMemory:
    """Pairs as a dataset gives them, whose numbers and lengths are drawn from the pair's own."""

    labels = False

    def __init__(self, folder, fingerprint="f" * 64, num_pairs=NUM_PAIRS):
        self.shards = SimpleNamespace(folder=folder, manifest=SimpleNamespace(fingerprint=fingerprint))
        self.fetched = []
        self.num_pairs = num_pairs

    def __len__(self):
        return self.num_pairs

    def fetch(self, windows):
        self.fetched += windows.tolist()
        batch = {}
        for place, side in enumerate(("chosen", "rejected")):
            draws = [np.random.default_rng([number, place]) for number in windows.tolist()]
            ids = np.stack([draw.integers(0, 40, LENGTH + 1) for draw in draws])
            targets = ids[:, 1:].copy()
            for row, draw in zip(targets, draws, strict=True):
                row[draw.integers(1, LENGTH) :] = IGNORED
            batch |= {f"{side}_input_ids": ids[:, :-1].copy(), f"{side}_targets": targets}
        return batch


def make_model():
    model = MiniMind(SHAPE).eval().requires_grad_(False)
    initialize(model, 5)
    return model


def not_needed():
    raise AssertionError("the reference was made again")


def make(windows, model=make_model, of=OF, say=None, batch=4):
    said = Said() if say is None else say
    return reference_log_probs(windows, of, model, batch=batch, device=torch.device("cpu"), say=said)


@pytest.fixture
def dataset(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def files(dataset, suffix):
    return sorted((dataset / REFERENCE_FOLDER_NAME).glob(f"*{suffix}"))


def test_they_are_the_models_own_and_stand_at_their_pair(dataset):
    said = Said()
    windows = PairsInMemory(dataset)
    found = make(windows, say=said)
    assert (found.shape, found.dtype) == ((NUM_PAIRS, 2), np.float32)
    assert isinstance(found, np.memmap)
    assert sorted(windows.fetched) == list(range(NUM_PAIRS))
    everything = windows.fetch(np.arange(NUM_PAIRS))
    expected, _ = log_probs_of_pairs(make_model(), {n: torch.from_numpy(a) for n, a in everything.items()})
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)
    assert "computing the reference's log-probabilities of 23 pairs, once" in said.text
    assert {path.suffix for path in (dataset / REFERENCE_FOLDER_NAME).iterdir()} == {".npy", ".json"}


def test_a_second_time_nothing_is_computed(dataset):
    first = np.array(make(PairsInMemory(dataset)))
    windows = PairsInMemory(dataset)
    assert np.array_equal(make(windows, not_needed), first)
    assert windows.fetched == []


@pytest.mark.parametrize(
    "other",
    [
        {"of": Reference(weights="x" * 64, seq_len=8, dtype="fp32")},
        {"of": Reference(weights="w" * 64, seq_len=9, dtype="fp32")},
        {"of": Reference(weights="w" * 64, seq_len=8, dtype="bf16")},
    ],
)
def test_another_reference_or_window_has_a_file_of_its_own(dataset, other):
    make(PairsInMemory(dataset))
    windows = PairsInMemory(dataset)
    make(windows, **other)
    assert sorted(windows.fetched) == list(range(NUM_PAIRS))
    make(PairsInMemory(dataset), not_needed)
    assert len(files(dataset, ".npy")) == 2


def test_those_of_other_tokens_are_made_again_and_the_old_ones_go(dataset):
    make(PairsInMemory(dataset))
    windows = PairsInMemory(dataset, fingerprint="e" * 64)
    make(windows)
    assert sorted(windows.fetched) == list(range(NUM_PAIRS))
    assert [path.name[:4] for path in files(dataset, ".npy")] == ["eeee"]


def test_other_files_in_their_folder_are_somebodys(dataset):
    make(PairsInMemory(dataset))
    others = [dataset / REFERENCE_FOLDER_NAME / name for name in ("notes.json", "mine.npy", "x.unfinished")]
    for path in others:
        path.touch()
    make(PairsInMemory(dataset, fingerprint="e" * 64))
    assert all(path.exists() for path in others)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def edit(path):
    told = json.loads(path.read_bytes())
    path.write_text(json.dumps({**told, "pairs": 22}))


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".npy", flip),
        (".npy", cut),
        (".npy", os.unlink),
        (".json", edit),
        (".json", cut),
        (".json", os.unlink),
        (".json", lambda path: path.write_text("[]")),
    ],
)
def test_what_is_damaged_is_made_again(dataset, suffix, damage):
    first = np.array(make(PairsInMemory(dataset)))
    damage(files(dataset, suffix)[0])
    windows = PairsInMemory(dataset)
    assert np.array_equal(make(windows), first)
    assert sorted(windows.fetched) == list(range(NUM_PAIRS))
    make(PairsInMemory(dataset), not_needed)


def kill_at_the_third_batch(dataset):
    real, calls = reference.log_probs_of_pairs, []

    def computed(*given):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given)

    reference.log_probs_of_pairs = computed
    make(PairsInMemory(dataset))


@pytest.mark.parametrize(("group", "first"), [(4, 0), (2, 8)], ids=["inside a group", "between two"])
def test_a_killed_process_leaves_what_it_has_computed_and_no_other_rounding(
    dataset, monkeypatch, group, first
):
    monkeypatch.setattr(reference, "_BATCHES_PER_GROUP", group)
    killed = multiprocessing.get_context("fork").Process(target=kill_at_the_third_batch, args=(dataset,))
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert files(dataset, ".npy") == []
    calls, real = [], reference.log_probs_of_pairs
    monkeypatch.setattr(reference, "log_probs_of_pairs", lambda *given: (calls.append(1), real(*given))[1])
    said, windows = Said(), PairsInMemory(dataset)
    found = np.array(make(windows, say=said))
    assert sorted(windows.fetched) == list(range(first, NUM_PAIRS)), "groups that are done are not read again"
    assert "of 15 pairs, once; 8 are there already" in said.text
    assert len(calls) == 4, "of six batches, those that the other one had no time for"
    shutil.rmtree(dataset / REFERENCE_FOLDER_NAME)
    assert np.array_equal(found, make(PairsInMemory(dataset)))


def test_a_process_that_comes_second_waits_and_computes_nothing(dataset, monkeypatch):
    said = Said()

    def meanwhile(*_, **__):
        monkeypatch.undo()
        make(PairsInMemory(dataset))
        return dataset

    # Between a first look and the lock another process has made them.
    real = reference.FolderLock
    monkeypatch.setattr(reference, "FolderLock", lambda *a, **k: (meanwhile(), real(*a, **k))[1])
    windows = PairsInMemory(dataset)
    make(windows, not_needed, say=said)
    assert windows.fetched == []


def test_a_reference_that_gives_no_numbers(dataset):
    def broken():
        model = make_model()
        model.model.norm.weight.fill_(float("nan"))
        return model

    with pytest.raises(UserError, match="that are not finite"):
        make(PairsInMemory(dataset), broken)
    make(PairsInMemory(dataset))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_dataset_that_cannot_be_written(dataset):
    dataset.chmod(0o555)
    with pytest.raises(UserError, match="`reference` online"):
        make(PairsInMemory(dataset))


def test_a_file_in_the_place_of_the_folder(dataset):
    (dataset / REFERENCE_FOLDER_NAME).write_text("")
    with pytest.raises(UserError, match="`reference` online"):
        make(PairsInMemory(dataset))


def test_windows_with_the_reference_beside_them(dataset):
    windows = PairsInMemory(dataset)
    log_probs = make(windows)
    beside = ReferencedWindows(windows, log_probs)
    assert (len(beside), beside.labels) == (NUM_PAIRS, False)
    batch = beside.fetch(np.array([7, 0, 7]))
    assert np.array_equal(batch[REFERENCE], log_probs[[7, 0, 7]])
    assert np.array_equal(batch["chosen_input_ids"], windows.fetch(np.array([7, 0, 7]))["chosen_input_ids"])


def test_they_are_found_again_by_the_name_that_they_have_always_had(dataset):
    make(PairsInMemory(dataset))
    (path,) = files(dataset, ".npy")
    assert path.name == "ffffffffffffffff-0beae4f5d30d5bd3.npy"
    content = json.loads(path.with_suffix(".json").read_bytes())
    del content["checksum"], content["sha256"]
    assert content == {
        "format_version": 1, "dataset": "f" * 64, "weights": "w" * 64, "seq_len": 8, "dtype": "fp32", "pairs": NUM_PAIRS,
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(NUM_PAIRS - 1, 2), (NUM_PAIRS, 3), None])
def test_what_is_unfinished_of_something_else_is_begun_anew(dataset, shape):
    expected = np.array(make(PairsInMemory(dataset)))
    path = files(dataset, ".npy")[0].with_suffix(".unfinished")
    shutil.rmtree(dataset / REFERENCE_FOLDER_NAME)
    path.parent.mkdir()
    if shape is None:
        path.write_bytes(b"nothing that numpy knows")
    else:
        np.save(path.with_suffix(".npy"), np.zeros(shape, np.float32))
        path.with_suffix(".npy").rename(path)
    said, windows = Said(), PairsInMemory(dataset)
    assert np.array_equal(make(windows, say=said), expected)
    assert sorted(windows.fetched) == list(range(NUM_PAIRS))
    assert "of 23 pairs, once" in said.text
    assert "already" not in said.text


def test_a_pair_of_which_one_side_is_missing_is_computed(dataset):
    expected = np.array(make(PairsInMemory(dataset)))
    path = files(dataset, ".npy")[0].with_suffix(".unfinished")
    shutil.rmtree(dataset / REFERENCE_FOLDER_NAME)
    path.parent.mkdir()
    half = expected.copy()
    half[5, 1] = np.nan
    with path.open("wb") as file:
        np.save(file, half)
    said = Said()
    assert np.array_equal(make(PairsInMemory(dataset), say=said), expected)
    assert "of 1 pairs, once; 22 are there already" in said.text


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_one_number_that_is_not_finite_is_too_many(dataset, monkeypatch, number):
    real, calls = reference.log_probs_of_pairs, []

    def computed(*given):
        log_probs, balance = real(*given)
        calls.append(1)
        if len(calls) == 2:
            log_probs[1, 0] = number
        return log_probs, balance

    monkeypatch.setattr(reference, "log_probs_of_pairs", computed)
    with pytest.raises(UserError, match="that are not finite"):
        make(PairsInMemory(dataset))
    assert [path.suffix for path in (dataset / REFERENCE_FOLDER_NAME).iterdir()] in ([], [".lock"])


def test_numbers_of_other_bits_are_begun_anew_too(dataset):
    expected = np.array(make(PairsInMemory(dataset)))
    path = files(dataset, ".npy")[0].with_suffix(".unfinished")
    shutil.rmtree(dataset / REFERENCE_FOLDER_NAME)
    path.parent.mkdir()
    with path.open("wb") as file:
        np.save(file, np.zeros((NUM_PAIRS, 2), np.float64))
    assert np.array_equal(make(PairsInMemory(dataset)), expected)


def test_files_of_other_states_of_the_dataset_go_and_nothing_else_does(dataset):
    folder = dataset / REFERENCE_FOLDER_NAME
    folder.mkdir()
    other = "e" * 16 + "-" + "0" * 16
    kept = {"old.npy", "old.json", f"{other}.txt", f"x{other}.npy", "f" * 16 + "-" + "0" * 16 + ".npy"}
    for name in (f"{other}.npy", f"{other}.json", f"{other}.unfinished", *kept):
        (folder / name).touch()
    make(PairsInMemory(dataset))
    left = {path.name for path in folder.iterdir() if path.suffix != ".lock"}
    made = {path.name for path in files(dataset, ".json") if path.name.startswith("ffff")}
    assert len(made) == 1
    assert left == kept | made | {name.replace(".json", ".npy") for name in made}


def test_reading_ahead_is_left_to_the_pairs(dataset):
    asked = []
    windows = PairsInMemory(dataset)
    windows.shard_sets, windows.will_need = ("its shards",), asked.append
    beside = ReferencedWindows(windows, np.zeros((NUM_PAIRS, 2), np.float32))
    beside.will_need(np.array([3, 1]))
    assert [numbers.tolist() for numbers in asked] == [[3, 1]]
    assert beside.shard_sets == ("its shards",)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((NUM_PAIRS, 2)),
        np.zeros((NUM_PAIRS - 1, 2), np.float32),
        np.zeros(NUM_PAIRS * 2, np.float32),
        np.full((NUM_PAIRS, 2), np.inf, np.float32),
        np.zeros((NUM_PAIRS, 2), "U1"),
        None,
    ],
    ids=str,
)
def test_a_file_of_another_shape_is_made_again_though_its_checksum_fits(dataset, array):
    made = np.array(make(PairsInMemory(dataset)))
    (path,), (record,) = files(dataset, ".npy"), files(dataset, ".json")
    if array is None:
        path.write_bytes(b"")
    else:
        np.save(path, array)
    content = json.loads(record.read_bytes())
    del content["checksum"]
    write_with_checksum(record, content | {"sha256": sha256_of(path)}, "checksum")
    assert np.array_equal(make(PairsInMemory(dataset)), made)
