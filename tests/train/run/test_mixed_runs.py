"""Runs over mixtures: what they learn when, what they say of it, and weights that change on the way."""

import shutil
from pathlib import Path

import pytest

from minimind_data.errors import UserError
from minimind_train.batches.datasets import Datasets
from minimind_train.order.mixture import MixtureStage
from minimind_train.run import entry
from minimind_train.run.entry import resume
from minimind_train.run_folder import checkpoint
from minimind_train.run_folder.record import Change, RunRecord
from tests.helpers.datasets import text_dataset
from tests.helpers.runs import Said, config_of, metrics, stop_after, weights


@pytest.fixture(scope="module")
def parts(tmp_path_factory, small_dataset, other_dataset):
    """Two words for --shards: parts a and b, three windows of a to one of b."""
    return (f"a={small_dataset}:0.75", f"b={other_dataset}:0.25")


@pytest.fixture(scope="module")
def mixed_run(tmp_path_factory, parts):
    run = tmp_path_factory.mktemp("mixed") / "run"
    entry.begin(config_of(run, parts, keep=0, dropout=0.1), Said())
    return run


@pytest.fixture
def begin_mixed(tmp_path, parts):
    def begin(**changes):
        said = Said()
        return entry.begin(config_of(tmp_path / "run", parts, **{"keep": 0, **changes}), said), said

    return begin


def test_a_run_takes_its_parts_by_weight_and_says_so(begin_mixed, tmp_path, parts):
    _, said = begin_mixed(log_every=1)
    assert "mixture of 2, wanted of the tokens: a=0.75 b=0.25; a pattern of 4 windows:" in said.text
    assert "  a: 3 of 4 windows (0.7500)" in said.text
    assert "epochs a 0." in said.text
    datasets = Datasets.open(parts)
    windows = datasets.windows(layout="concat", seq_len=16, say=Said())
    last = metrics(tmp_path / "run")[-1]
    assert last["position"] == 96
    assert last["epochs"] == {
        "a": round(72 / len(windows.parts[0]), 4),
        "b": round(24 / len(windows.parts[1]), 4),
    }
    record = RunRecord.read(tmp_path / "run")
    assert record.options["mixture_stages"] == [{"start": 0, "shares": [3, 1], "taken": [0, 0]}]
    assert record.dataset.split(" ")[1] == f"b={datasets.sets[1].manifest.fingerprint}"
    state = checkpoint.load(tmp_path / "run", 12).state
    assert state.config == record.options
    assert state.dataset == record.dataset


def test_a_mixed_run_resumes_bit_for_bit_however_its_parts_are_listed(
    mixed_run, begin_mixed, tmp_path, parts
):
    begin_mixed(dropout=0.1)
    stop_after(tmp_path / "run", 6)
    resume(tmp_path / "run", {"shards": parts[::-1]}, say=Said())
    assert weights(tmp_path / "run", 12) == weights(mixed_run, 12)
    assert metrics(tmp_path / "run") == metrics(mixed_run)
    assert RunRecord.read(tmp_path / "run").changes == ()


def test_new_weights_hold_from_the_position_on_and_in_every_later_resume(begin_mixed, tmp_path, parts):
    run = tmp_path / "run"
    begin_mixed()
    before = metrics(run)
    stop_after(run, 6)
    other = [part.replace("0.75", "1").replace("0.25", "3") for part in parts]
    with pytest.raises(
        UserError,
        match=r"weights \(in the run: a=0\.75 b=0\.25, asked for: a=0\.25 b=0\.75\).*`reweight`",
    ):
        resume(run, {"shards": other}, say=Said())
    resume(run, {"shards": other}, allow_change={"weights"}, say=Said())
    record = RunRecord.read(run)
    assert [MixtureStage.of(told) for told in record.options["mixture_stages"]] == [
        MixtureStage(start=0, shares=(3, 1), taken=(0, 0)),
        MixtureStage(start=48, shares=(1, 3), taken=(36, 12)),
    ]
    assert record.changes == (Change(step=6, name="weights", old="a=0.75 b=0.25", new="a=0.25 b=0.75"),)
    there, last = metrics(run), weights(run, 12)
    assert there[:6] == before[:6]
    assert there[6]["loss"] != before[6]["loss"]
    sizes = [
        len(part) for part in Datasets.open(parts).windows(layout="concat", seq_len=16, say=Said()).parts
    ]
    assert there[-1]["epochs"] == {"a": round(48 / sizes[0], 4), "b": round(48 / sizes[1], 4)}
    for stop in (9, 6, 3, 0):  # also back to before the change, which stays where it was in the data
        stop_after(run, stop)
        resume(run, {"shards": other} if stop == 9 else {}, say=Said())
        assert metrics(run) == there
        assert weights(run, 12) == last


def test_a_part_may_wait(tmp_path, parts):
    waiting = [part.replace("0.25", "0") for part in parts]
    entry.begin(config_of(tmp_path / "run", waiting, steps=3), Said())
    assert metrics(tmp_path / "run")[-1]["epochs"]["b"] == 0


def test_an_epoch_of_a_mixture_is_as_long_as_its_parts(begin_mixed, parts):
    total = len(Datasets.open(parts).windows(layout="concat", seq_len=16, say=Said()))
    outcome, _ = begin_mixed(steps=None, epochs=1, global_batch=64, log_every=100)
    assert outcome.position == total


def test_a_run_over_a_mixture_in_any_layout_keeps_documents_apart(tmp_path, small_dataset, other_dataset):
    copies = [shutil.copytree(d, tmp_path / d.name) for d in (small_dataset, other_dataset)]
    words = [f"p{number}={copy}:1" for number, copy in enumerate(copies)]
    options = {"layout": "pack", "seq_len": 64, "steps": 6, "keep": 0, "val_shards": str(copies[1])}
    entry.begin(config_of(tmp_path / "run", words, **options), Said())
    last, there = weights(tmp_path / "run", 6), metrics(tmp_path / "run")
    assert RunRecord.read(tmp_path / "run").options["document_mask"] is True
    stop_after(tmp_path / "run", 3)
    resume(tmp_path / "run", {"micro_batch": 8, "val_every": 1000}, say=Said())
    assert [record["epochs"] for record in metrics(tmp_path / "run")] == [
        record["epochs"] for record in there
    ]
    stop_after(tmp_path / "run", 3)
    resume(tmp_path / "run", {"micro_batch": 4}, say=Said())
    assert weights(tmp_path / "run", 6) == last


def test_the_parts_of_a_run_stay(begin_mixed, tmp_path, parts, whole_run, small_dataset):
    begin_mixed(steps=3)
    run = tmp_path / "run"
    config = (run / "config.json").read_bytes()
    for words, shown in (
        ((parts[0],), "in the run: a, b, asked for: a"),
        ((*parts, f"c={small_dataset}:1"), "asked for: a, b, c"),
        ((str(small_dataset),), "asked for: one dataset without a name"),
    ):
        with pytest.raises(UserError, match=shown):
            resume(
                run, {"shards": words, "steps": 4}, allow_change={"steps", "weights", "dataset"}, say=Said()
            )
    with pytest.raises(UserError, match="in the run: one dataset without a name, asked for: a, b"):
        resume(whole_run, {"shards": parts}, say=Said())
    assert (run / "config.json").read_bytes() == config


def test_another_dataset_in_a_part_is_refused(begin_mixed, tmp_path, parts):
    begin_mixed(steps=3)
    exchanged = text_dataset(tmp_path / "exchanged", seed=5)
    words = (parts[0], f"b={exchanged}:0.25")
    with pytest.raises(
        UserError, match=r"dataset \(in the run: a=\w{12} b=\w{12}, in the dataset now: a=\w{12} b=\w{12}\)"
    ):
        resume(tmp_path / "run", {"shards": words}, say=Said())


def test_a_place_in_one_dataset_is_none_in_a_mixture(begin_mixed):
    with pytest.raises(UserError, match="`resume_from` needs one dataset"):
        begin_mixed(order="sequential", resume_from="text-00000:5")


def test_a_moved_part_is_the_same_part(begin_mixed, tmp_path, parts, other_dataset):
    begin_mixed()
    run = tmp_path / "run"
    last = weights(run, 12)
    stop_after(run, 6)
    moved = Path(other_dataset).rename(tmp_path / "moved")
    try:
        with pytest.raises(UserError, match="no dataset.*moved, say where by `shards`"):
            resume(run, {}, say=Said())
        resume(run, {"shards": (parts[0], f"b={moved}:1/4")}, say=Said())
    finally:
        moved.rename(other_dataset)
    assert weights(run, 12) == last
