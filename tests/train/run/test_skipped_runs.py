"""Runs that leave positions out: once told, never learned, in whatever way the run is stopped and goes on."""

import json
import math

import numpy as np
import pytest
from typer.testing import CliRunner

from minimind_cli import data
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.windows.opening import open_windows
from minimind_train.batches.torch_loader import ResumableBatchSampler
from minimind_train.order.sample_order import SampleOrder
from minimind_train.order.skips import Skips
from minimind_train.run.entry import resume
from minimind_train.run_folder import checkpoint
from minimind_train.run_folder.record import Change, RunRecord
from tests.helpers.loops import step_loader
from tests.helpers.runs import Said, metrics, stop_after, weights


@pytest.fixture(scope="module")
def windows(small_dataset):
    return open_windows(ShardSet.open(small_dataset), layout="concat", seq_len=16)


def rows(batches):
    return [row for batch in batches for micro in batch.micro_batches for row in micro["input_ids"].tolist()]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("ranges", [["0:5"], ["10:11", "13:30"], ["3:9", "50:60"], ["55:70"], []])
def test_a_step_loader_gives_what_is_kept_in_whole_batches(windows, ranges, world_size):
    order, skips = SampleOrder(num_windows=len(windows), seed=3), Skips.of(ranges)
    options = {"start": 4, "stop": 60, "global_batch": 7, "micro_batch": 2, "world_size": world_size}
    kept = [p for p in range(4, 60) if not any(a <= p < b for a, b in skips.ranges)]
    steps = [
        list(step_loader(windows, order, rank=rank, skips=skips, **options)) for rank in range(world_size)
    ]
    position = 4
    for number, shares in enumerate(zip(*steps, strict=True)):
        batch = kept[7 * number : 7 * number + 7]
        assert {share.start for share in shares} == {position}
        assert {share.stop for share in shares} == {position := batch[-1] + 1}
        for rank, share in enumerate(shares):
            expected = windows.fetch(order.windows(np.array(batch[rank::world_size])))["input_ids"].tolist()
            assert rows([share]) == expected
    assert len(steps[0]) == math.ceil(len(kept) / 7)
    assert len(step_loader(windows, order, skips=skips, **options)) == len(steps[0])


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("ranges", [["0:5"], ["10:12", "13:30"], ["38:40"], ["35:45"], ["0:40"]])
def test_a_batch_sampler_resumes_anywhere_around_what_is_left_out(ranges, drop_last):
    order, skips = SampleOrder(num_windows=40, seed=3), Skips.of(ranges)

    def sampler():
        return ResumableBatchSampler(order, 6, skips=skips, drop_last=drop_last)

    def two_epochs(place):
        batches = list(place)
        return batches + list(place) if place.epoch < 2 else batches

    whole = two_epochs(sampler())
    kept = [
        [p for p in range(40 * e, 40 * e + 40) if not any(a <= p < b for a, b in skips.ranges)]
        for e in (0, 1)
    ]
    per_epoch = [len(k) // 6 if drop_last else math.ceil(len(k) / 6) for k in kept]
    used = [k[: 6 * n] for k, n in zip(kept, per_epoch, strict=True)]
    assert [w for batch in whole for w in batch] == order.windows(
        np.array(used[0] + used[1], np.int64)
    ).tolist()
    for done in range(per_epoch[0] + 1):
        one = sampler()
        iteration = iter(one)
        assert len(iteration) == per_epoch[0]
        for _ in range(done):
            next(iteration)
        state = one.state_after(done)
        assert state == one.state_dict()
        again = sampler()
        again.load_state_dict(state)
        assert two_epochs(again) == whole[done:]


def test_a_run_leaves_out_what_it_is_told_to(begin, tmp_path, windows, whole_run):
    outcome, said = begin(skip_positions=["20:30", "5:6"], steps=6, keep=0)
    assert outcome.position == 48 + 11
    assert "positions 20 to 29 are left out" in said
    assert [record["position"] for record in metrics(tmp_path / "run")] == [9, 17, 35, 43, 51, 59]
    assert RunRecord.read(tmp_path / "run").options["skip_positions"] == ["5:6", "20:30"]
    assert checkpoint.load(tmp_path / "run", 3).state.config["skip_positions"] == ["5:6", "20:30"]
    last = weights(tmp_path / "run", 6)
    stop_after(tmp_path / "run", 3)
    assert resume(tmp_path / "run", {}, say=Said()) == outcome
    assert weights(tmp_path / "run", 6) == last


def test_a_resume_can_leave_out_more_which_stays_left_out(stopped_run, whole_run):
    said = Said()
    resume(stopped_run, {"skip_positions": ("60:70", "10:12")}, say=said)
    assert "positions 10 to 11 are left out, but the run is at 48 and has been there" in said
    record = RunRecord.read(stopped_run)
    assert record.options["skip_positions"] == ["10:12", "60:70"]
    assert record.changes == (Change(step=6, name="skip_positions", old=[], new=["10:12", "60:70"]),)
    assert [m["position"] for m in metrics(stopped_run)][5:] == [48, 56, 74, 82, 90, 98, 106]
    assert metrics(stopped_run)[:7] == metrics(whole_run)[:7]
    last = metrics(stopped_run)
    stop_after(stopped_run, 9)
    resume(stopped_run, {"skip_positions": ["60:65"]}, say=Said())
    assert metrics(stopped_run) == last
    assert RunRecord.read(stopped_run) == record
    stop_after(stopped_run, 9)
    resume(stopped_run, {"skip_positions": ["70:72"]}, say=Said())
    assert RunRecord.read(stopped_run).options["skip_positions"] == ["10:12", "60:72"]
    assert metrics(stopped_run)[-1]["position"] == 106


def test_an_epoch_without_some_of_it_has_fewer_steps(begin, windows, tmp_path):
    n = len(windows)
    outcome, _ = begin(steps=None, epochs=1, skip_positions=[f"{n - 10}:{n + 5}"], keep=0)
    assert outcome.total_steps == math.ceil((n - 10) / 8)
    assert outcome.position == n - 10
    said = Said()
    resume(tmp_path / "run", {}, say=said)
    assert "finished already" in said.text


def test_a_run_that_leaves_all_out_is_refused(begin, tmp_path):
    with pytest.raises(UserError, match="leaves out all that the run would learn"):
        begin(steps=None, epochs=1, skip_positions=["0:1000000"])
    assert not (tmp_path / "run").exists()


def test_what_is_no_range_is_wrong_usage(begin, stopped_run):
    with pytest.raises(ValueError, match="`skip_positions` must be A:B"):
        begin(skip_positions=["5"])
    with pytest.raises(ValueError, match="`skip_positions` must be A:B"):
        resume(stopped_run, {"skip_positions": ["9:8"]}, say=Said())


def test_what_was_learned_before_it_was_to_be_left_out_is_told_apart(stopped_run):
    """The positions 40 to 59 are to be left out when the run is at 48."""
    resume(stopped_run, {"skip_positions": ["40:60"]}, say=Said())
    record = RunRecord.read(stopped_run)
    assert record.changes[0].position == 48
    assert [record.skip_positions_at(position) for position in (40, 47)] == [(), ()]
    assert [record.skip_positions_at(position) for position in (48, 59, 60, 500)] == [("40:60",)] * 4
    for position in (39, 40, 47, 48, 59, 60):
        words = ["locate", "--run", str(stopped_run), "--position", str(position), "--json"]
        told = json.loads(CliRunner().invoke(data.app, words).stdout)
        assert told.get("left_out", False) is (48 <= position < 60)
    resume(stopped_run, {"skip_positions": ["80:90"], "steps": 15}, allow_change={"steps"}, say=Said())
    record = RunRecord.read(stopped_run)
    assert [record.skip_positions_at(position) for position in (47, 60)] == [(), ("40:60",)]
    assert record.skip_positions_at(500) == ("40:60", "80:90")


def test_going_back_before_that_lets_it_hold_from_there(stopped_run):
    resume(stopped_run, {"skip_positions": ["30:60"]}, say=Said())
    stop_after(stopped_run, 3)
    resume(stopped_run, {}, say=Said())
    record = RunRecord.read(stopped_run)
    assert record.changes == (Change(step=3, name="skip_positions", old=[], new=["30:60"]),)
    assert [record.skip_positions_at(position) for position in (23, 24)] == [(), ("30:60",)]
    assert [m["position"] for m in metrics(stopped_run)][2:5] == [24, 62, 70]
