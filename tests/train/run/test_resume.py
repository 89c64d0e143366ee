"""`--resume`: the run that was, unless a change is asked for by name; and moving the position by hand."""

import math
import shutil

import pytest

from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.windows.opening import open_windows
from minimind_train.run.entry import resume
from minimind_train.run.options import PretrainOptions, changeable
from minimind_train.run_folder import checkpoint
from minimind_train.run_folder.record import Change, RunRecord
from tests.helpers.runs import OPTIONS, Said, metrics, steps, stop_after, weights


def test_a_finished_run_is_left_as_it_is(begin, tmp_path):
    begin(steps=2)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    said = Said()
    outcome = resume(tmp_path / "run", {}, say=said)
    assert "finished already, 2 steps" in said.text
    assert (outcome.step, outcome.loss) == (2, None)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_resumed_run_ends_as_if_it_had_never_been_stopped(stopped_run, whole_run):
    said = Said()
    assert resume(stopped_run, {}, say=said).step == 12
    assert "going on after step 6 of 12 at position 48" in said.text
    assert weights(stopped_run, 12) == weights(whole_run, 12)
    assert metrics(stopped_run) == metrics(whole_run)


def test_before_the_first_checkpoint_a_run_begins_again(stopped_run, whole_run):
    stop_after(stopped_run, 0)
    resume(stopped_run, {}, say=Said())
    assert weights(stopped_run, 12) == weights(whole_run, 12)
    assert metrics(stopped_run) == metrics(whole_run)


def test_a_damaged_checkpoint_is_passed_over(stopped_run, whole_run):
    path = checkpoint.folder_of(stopped_run, 6) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    said = Said()
    resume(stopped_run, {}, say=said)
    assert "step-000000006 is damaged (model.safetensors has" in said[0]
    assert "going on after step 3 of 12" in said.text
    assert weights(stopped_run, 12) == weights(whole_run, 12)
    assert metrics(stopped_run) == metrics(whole_run)


def test_what_is_harmless_may_change_and_stays_changed(stopped_run):
    resume(
        stopped_run,
        {"micro_batch": 8, "log_every": 5, "save_every": 5, "keep": 1, "device": "cpu"},
        say=Said(),
    )
    assert steps(stopped_run) == [1, 2, 3, 4, 5, 6, 10, 12]
    assert checkpoint.steps_of(stopped_run) == [12]
    record = RunRecord.read(stopped_run)
    assert record.changes == ()
    assert (record.options["micro_batch"], record.options["keep"]) == (8, 1)


def test_a_moved_dataset_is_the_same_dataset(stopped_run, whole_run, small_dataset, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(small_dataset, moved)
    record = RunRecord.read(stopped_run)
    record.options["shards"] = str(tmp_path / "gone")
    record.write(stopped_run)
    with pytest.raises(UserError, match=r"gone: no dataset.*moved, say where by `shards`"):
        resume(stopped_run, {})
    resume(stopped_run, {"shards": moved}, say=Said())
    assert weights(stopped_run, 12) == weights(whole_run, 12)


@pytest.mark.parametrize(
    ("name", "value", "sides"),
    [
        ("learning_rate", 1e-3, "in the run: 0.0005, asked for: 0.001"),
        ("seq_len", 8, "in the run: 16, asked for: 8"),
        ("layout", "pad", "in the run: concat, asked for: pad"),
        ("document_mask", True, "in the run: False, asked for: True"),
        ("order", "sequential", "in the run: shuffled, asked for: sequential"),
        ("shuffle_block", 4, "in the run: 1, asked for: 4"),
        ("seed", 1, "in the run: 42, asked for: 1"),
        ("global_batch", 4, "in the run: 8, asked for: 4"),
        ("steps", 13, "in the run: 12, asked for: 13"),
        ("epochs", 2, "in the run: None, asked for: 2"),
        ("hidden_size", 32, "in the run: 16, asked for: 32"),
        ("dropout", 0.0, "in the run: 0.1, asked for: 0.0"),
        ("dtype", "bf16", "in the run: fp32, asked for: bf16"),
        ("warmup_steps", 2, "in the run: 0, asked for: 2"),
        ("beta2", 0.95, "in the run: 0.999, asked for: 0.95"),
    ],
)
def test_what_would_make_another_run_is_refused_with_both_sides(stopped_run, name, value, sides):
    before = (stopped_run / "config.json").read_bytes()
    with pytest.raises(UserError) as error:
        resume(stopped_run, {name: value})
    assert f"{name} ({sides})" in str(error.value)
    remedy = "start a new run in another `run`" if name == "hidden_size" else f"`allow_change` {name}"
    assert remedy in str(error.value)
    assert (stopped_run / "config.json").read_bytes() == before
    assert (name in changeable(PretrainOptions)) is (name != "hidden_size")


@pytest.fixture
def masked(tmp_path, small_dataset):
    """Options of a run that keeps documents apart, on a dataset that a packing plan may be written into."""
    shards = shutil.copytree(small_dataset, tmp_path / "data")
    return {"shards": shards, "layout": "pack", "seq_len": 40, "keep": 0, "dropout": 0.1}


def test_a_run_with_a_document_mask_is_resumed_exactly(begin, tmp_path, masked):
    begin(**masked)
    run = tmp_path / "run"
    assert RunRecord.read(run).options["document_mask"] is True
    assert checkpoint.load(run, 6).state.config["document_mask"] is True
    last, told = weights(run, 12), metrics(run)
    stop_after(run, 6)
    with pytest.raises(UserError, match=r"document_mask \(in the run: True, asked for: False\)"):
        resume(run, {"document_mask": False})
    resume(run, {}, say=Said())
    assert (weights(run, 12), metrics(run)) == (last, told)
    stop_after(run, 6)
    resume(run, {"document_mask": False}, allow_change={"document_mask"}, say=Said())
    assert weights(run, 12) != last
    assert RunRecord.read(run).changes == (Change(step=6, name="document_mask", old=True, new=False),)


def test_a_run_from_before_the_document_mask_goes_on_without_it(begin, tmp_path, masked):
    begin(**masked, document_mask=False)
    run = tmp_path / "run"
    last = weights(run, 12)
    stop_after(run, 6)
    record = RunRecord.read(run)
    del record.options["document_mask"]
    record.write(run)
    with pytest.raises(UserError, match=r"document_mask \(in the run: False, asked for: True\)"):
        resume(run, {"document_mask": True})
    resume(run, {}, say=Said())
    assert weights(run, 12) == last
    assert RunRecord.read(run).options["document_mask"] is False


def test_another_dataset_is_refused_unless_it_is_asked_for(stopped_run, other_dataset):
    here = ShardSet.open(other_dataset).manifest.fingerprint[:12]
    there = RunRecord.read(stopped_run).dataset[:12]
    with pytest.raises(UserError, match=rf"dataset \(in the run: {there}, in the dataset now: {here}\)"):
        resume(stopped_run, {"shards": other_dataset})
    resume(stopped_run, {"shards": other_dataset}, allow_change={"dataset"}, say=Said())
    assert RunRecord.read(stopped_run).changes == (Change(step=6, name="dataset", old=there, new=here),)


def test_the_same_words_again_are_no_change(stopped_run, whole_run, small_dataset):
    given = {**OPTIONS, "shards": small_dataset, "run": stopped_run, "head_dim": 8, "intermediate_size": 64}
    resume(stopped_run, given, say=Said())
    assert weights(stopped_run, 12) == weights(whole_run, 12)


def test_an_allowed_change_is_noted_and_stays(stopped_run, whole_run):
    resume(stopped_run, {"learning_rate": 0.002}, allow_change={"learning_rate"}, say=Said())
    record = RunRecord.read(stopped_run)
    assert record.options["learning_rate"] == 0.002
    assert record.changes == (Change(step=6, name="learning_rate", old=5e-4, new=0.002),)
    assert metrics(stopped_run)[-1]["lr"] == pytest.approx(4 * metrics(whole_run)[-1]["lr"])
    with pytest.raises(UserError, match=r"in the run: 0\.002"):
        resume(stopped_run, {"learning_rate": 5e-4})


def test_a_changed_global_batch_goes_on_at_the_same_sample(begin, tmp_path, small_dataset):
    n = len(open_windows(ShardSet.open(small_dataset), layout="concat", seq_len=16))
    run = tmp_path / "run"
    first, _ = begin(steps=None, epochs=1, keep=0)
    assert first.total_steps == math.ceil(n / 8)
    stop_after(run, 3)
    outcome = resume(run, {"global_batch": 5}, allow_change={"global_batch"}, say=Said())
    assert outcome.position == n
    assert outcome.total_steps == 3 + math.ceil((n - 24) / 5)
    assert [record["position"] for record in metrics(run)][2:5] == [24, 29, 34]
    stop_after(run, 6)
    assert resume(run, {}, say=Said()).total_steps == outcome.total_steps


@pytest.mark.parametrize("allowed", ["epochs", "steps"])
def test_steps_and_epochs_take_each_others_place_and_both_sides_show(stopped_run, allowed):
    with pytest.raises(UserError) as error:
        resume(stopped_run, {"epochs": 1}, say=Said())
    assert (
        "epochs (in the run: None, asked for: 1); steps (in the run: 12, asked for: None); leave that out, "
        "or pass `allow_change` epochs to change it from step 7 on"
    ) in str(error.value)
    outcome = resume(stopped_run, {"epochs": 1}, allow_change={allowed}, say=Said())
    record = RunRecord.read(stopped_run)
    assert (record.options["epochs"], record.options["steps"]) == (1, None)
    assert record.changes == (
        Change(step=6, name="epochs", old=None, new=1),
        Change(step=6, name="steps", old=12, new=None),
    )
    assert outcome.total_steps == outcome.step > 12


def test_metrics_that_are_gone_are_said_once_and_cost_nothing(stopped_run, whole_run):
    path = stopped_run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    damage = {
        0: path.unlink,
        2: lambda: path.write_bytes(b"".join(lines[:2])),
        4: lambda: path.write_bytes(b"".join([*lines[1:3], b"\xff\n", *lines[4:]])),
    }
    for left, damaged in damage.items():
        damaged()
        said = Said()
        assert resume(stopped_run, {}, say=said).step == 12
        assert (
            f"metrics.jsonl: {6 - left} of the 6 lines up to step 6 are gone or broken; training goes on"
            in said.text
        )
        assert weights(stopped_run, 12) == weights(whole_run, 12)
        assert metrics(stopped_run)[left:] == metrics(whole_run)[6:]
        said.clear()
        stop_after(stopped_run, 9)
        resume(stopped_run, {}, say=said)
        assert "are gone" not in said.text
        stop_after(stopped_run, 6)


def test_metrics_that_came_seldom_or_more_often_are_not_missed(stopped_run):
    for step, log_every in ((7, 100), (9, 7), (12, 1)):
        said = Said()
        resume(stopped_run, {"steps": step, "log_every": log_every}, allow_change={"steps"}, say=said)
        assert "are gone" not in said.text
    assert steps(stopped_run) == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12]


def test_a_tokenizer_that_is_gone_comes_back(stopped_run, whole_run):
    path = stopped_run / "tokenizer.json"
    for spoil in (path.unlink, lambda: path.write_text("{}")):
        spoil()
        resume(stopped_run, {}, say=Said())
        assert path.read_bytes() == (whole_run / "tokenizer.json").read_bytes()
        stop_after(stopped_run, 6)


def test_a_run_without_checkpoints_says_that_it_begins_again(stopped_run):
    stop_after(stopped_run, 0)
    said = Said()
    resume(stopped_run, {}, say=said)
    assert "no checkpoint yet, so the run begins again" in said[0]


def test_a_resume_clears_away_what_a_killed_process_left(stopped_run):
    ours = [
        stopped_run / "checkpoints" / "step-000000007.123.partial" / "model.safetensors",
        stopped_run / "checkpoints" / "step-000000003.deleted.123.partial" / "state.json",
        stopped_run / "config.json.123.partial",
    ]
    others = [stopped_run / "notes.123.partial", stopped_run / "films.123.partial" / "film"]
    for path in (*ours, *others):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    resume(stopped_run, {"steps": 6}, allow_change={"steps"}, say=Said())  # saves nothing
    assert not any(
        path.exists() or (path.parent.name.endswith(".partial") and path.parent.exists()) for path in ours
    )
    assert all(path.exists() for path in others)


# From a place in the shards


def test_sequential_metrics_name_the_next_unread_window(begin, tmp_path, small_dataset):
    _, said = begin(order="sequential", steps=4)
    windows = open_windows(ShardSet.open(small_dataset), layout="concat", seq_len=16)
    for record in metrics(tmp_path / "run"):
        assert (record["shard"], record["offset"]) == windows.locate(record["position"])
    assert "next text-00000:512" in said.text


def test_a_run_can_begin_at_a_token_of_a_shard(begin, tmp_path, small_dataset):
    windows = open_windows(ShardSet.open(small_dataset), layout="concat", seq_len=16)
    n, first = len(windows), windows.window_of("text-00001", 100)
    outcome, said = begin(order="sequential", steps=None, epochs=1, resume_from="text-00001:100", keep=0)
    assert outcome.total_steps == math.ceil((n - first) / 8)
    assert outcome.position == n
    assert metrics(tmp_path / "run")[0]["position"] == first + 8
    assert f"beginning at window {first}" in said.text
    for stop in (3, 0):
        stop_after(tmp_path / "run", stop)
        assert resume(tmp_path / "run", {}, say=Said()) == outcome


def test_the_position_can_be_moved_by_hand(begin, tmp_path, small_dataset):
    run = tmp_path / "run"
    windows = open_windows(ShardSet.open(small_dataset), layout="concat", seq_len=16)
    place = windows.window_of("text-00001", 200)
    begin(order="sequential", steps=None, epochs=2, keep=0)
    stop_after(run, 3)
    moved = resume(run, {"resume_from": "text-00001:200"}, say=Said())
    assert [record["position"] for record in metrics(run)][2:4] == [24, place + 8]
    assert moved.total_steps == 3 + math.ceil((2 * len(windows) - place) / 8)
    assert moved.position == 2 * len(windows)
    assert RunRecord.read(run).changes == (Change(step=3, name="cursor", old=24, new=place),)
    there = metrics(run)
    for stop in (6, 3):  # killed later, even before the next checkpoint: it goes on where it was moved to
        stop_after(run, stop)
        assert resume(run, {}, say=Said()) == moved
        assert metrics(run) == there


def test_going_back_before_a_moved_position_undoes_the_move(begin, tmp_path):
    run = tmp_path / "run"
    begin(order="sequential", steps=None, epochs=1, keep=0)
    unmoved = metrics(run)
    stop_after(run, 6)
    resume(run, {"resume_from": "text-00001:200"}, say=Said())
    stop_after(run, 3)
    resume(run, {}, say=Said())
    assert metrics(run) == unmoved
    assert not RunRecord.read(run).changes


def test_a_resume_that_fails_leaves_the_record_alone(stopped_run):
    before = (stopped_run / "config.json").read_bytes()
    for allowed in ((), ("hidden_size",)):
        with pytest.raises(UserError, match="decides the shape of the weights"):
            resume(stopped_run, {"hidden_size": 32}, allow_change=allowed, say=Said())
    assert (stopped_run / "config.json").read_bytes() == before
    assert resume(stopped_run, {}, say=Said()).step == 12


def test_a_shuffled_run_has_no_place_in_the_shards(stopped_run):
    with pytest.raises(UserError, match="needs `order` sequential"):
        resume(stopped_run, {"resume_from": "text-00000:0"})
