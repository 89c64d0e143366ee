import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from minimind_data.errors import UserError
from minimind_data.files import FolderLock
from minimind_data.options import build
from minimind_data.shards import ShardSet
from minimind_data.windows import IGNORED, open_windows
from minimind_train import checkpoint, runs
from minimind_train.metrics import read_metrics
from minimind_train.pretrain import CHANGEABLE, PretrainConfig, pretrain, resume
from minimind_train.runs import Change, RunRecord

OPTIONS = {
    "seq_len": 16,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "global_batch": 8,
    "micro_batch": 4,
    "steps": 12,
    "threads": 1,
    "save_every": 3,
    "log_every": 1,
    "dtype": "fp32",
    "device": "cpu",
}


def config_of(run, dataset, **changes):
    return build(PretrainConfig, {**OPTIONS, "run": run, "shards": dataset, **changes})


class Said(list):
    """Takes what a run says."""

    __call__ = list.append

    @property
    def text(self):
        return "\n".join(self)


@pytest.fixture(autouse=True)
def _threads_are_put_back():
    former = torch.get_num_threads()
    yield
    torch.set_num_threads(former)


@pytest.fixture
def begin(tmp_path, small_dataset):
    """Begin a run in the folder tmp_path/run."""

    def begin(**changes):
        said = Said()
        outcome = pretrain(config_of(tmp_path / "run", small_dataset, **changes), said)
        return outcome, said

    return begin


def stop_after(run, step):
    """Take a finished run back to what it was after a checkpoint, but for its metrics, which a crash leaves ahead."""
    for later in checkpoint.steps_of(run):
        if later > step:
            shutil.rmtree(checkpoint.folder_of(run, later))


def weights(run, step):
    return (checkpoint.folder_of(run, step) / "model.safetensors").read_bytes()


def steps(run):
    return [record["step"] for record in read_metrics(run / "metrics.jsonl")]


def metrics(run):
    return [{**record, "tokens_per_second": 0} for record in read_metrics(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, small_dataset):
    """A run that was never stopped, all of whose checkpoints were kept; read only."""
    run = tmp_path_factory.mktemp("whole") / "run"
    pretrain(config_of(run, small_dataset, keep=0, dropout=0.1), Said())
    return run


# A run and its folder


def test_a_run_folder_has_all_that_the_run_is(whole_run, small_dataset):
    assert {path.name for path in whole_run.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "metrics.jsonl",
        "checkpoints",
    }
    record = RunRecord.read(whole_run)
    shards = ShardSet.open(small_dataset)
    assert record.command == "pretrain"
    assert record.dataset == shards.manifest.fingerprint
    assert record.tokenizer == shards.manifest.tokenizer
    assert record.changes == ()
    assert (whole_run / "tokenizer.json").read_bytes() == (small_dataset / "tokenizer.json").read_bytes()
    told = record.options
    assert told["vocab_size"] == shards.manifest.tokenizer.vocab_size
    assert (told["head_dim"], told["intermediate_size"]) == (8, 64)
    assert (told["epochs"], told["steps"], told["threads"]) == (None, 12, 1)
    assert told["shards"] == str(small_dataset.resolve())
    assert "run" not in told
    assert checkpoint.steps_of(whole_run) == [3, 6, 9, 12]
    assert checkpoint.load(whole_run, 9).state.cursor == 72
    assert steps(whole_run) == list(range(1, 13))


def test_without_words_a_run_is_two_epochs_and_no_sample_is_lost(begin, tmp_path, small_dataset):
    n = len(open_windows(ShardSet.open(small_dataset), layout="concat", seq_len=16))
    outcome, _ = begin(steps=None, global_batch=31, log_every=100)
    assert outcome.total_steps == outcome.step == math.ceil(2 * n / 31)
    assert outcome.cursor == 2 * n
    assert RunRecord.read(tmp_path / "run").options["epochs"] == 2


def test_layout_pad_trains_too(begin, tmp_path):
    outcome, _ = begin(layout="pad", epochs=1, steps=None)
    assert outcome.cursor == 64
    assert all(0 < record["targets"] < 8 * 16 for record in metrics(tmp_path / "run"))


def test_layout_pack_trains_too(begin, tmp_path, small_dataset):
    shards = shutil.copytree(small_dataset, tmp_path / "data")
    packing = {"layout": "pack", "long_documents": "fragment", "seq_len": 12}
    outcome, said = begin(shards=shards, epochs=1, steps=None, **packing)
    windows = open_windows(ShardSet.open(shards), **packing)
    targets = windows.fetch(np.arange(len(windows)))["targets"]
    assert outcome.cursor == len(windows)
    assert sum(record["targets"] for record in metrics(tmp_path / "run")) == (targets != IGNORED).sum()
    assert any("of all places filled" in line for line in said)


def test_a_run_of_more_steps_than_the_dataset_has_goes_on_into_further_epochs(begin, tmp_path):
    outcome, _ = begin(steps=5, global_batch=100, micro_batch=200)
    assert outcome.cursor == 500
    assert metrics(tmp_path / "run")[-1]["epoch"] >= 3
    assert RunRecord.read(tmp_path / "run").options["micro_batch"] == 100


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"seq_len": 100_000, "max_position_embeddings": 200_000}, "shorter --seq-len"),
        ({"max_position_embeddings": 15}, "longer than the model's --max-position-embeddings 15"),
        ({"shards": Path("nowhere")}, "no dataset"),
        ({"device": "cuda:77"}, "--device cuda:77"),
        ({"device": "abacus"}, "--device abacus"),
        ({"resume_from": "text-00000:4"}, "needs --order sequential"),
        ({"order": "sequential", "resume_from": "text-00007:4"}, "text-00007"),
        ({"order": "sequential", "resume_from": "text-00000:4000000"}, "4000000"),
    ],
)
def test_what_cannot_be_run_leaves_no_folder(begin, tmp_path, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        begin(**changes)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_not_begun_again(begin, tmp_path):
    begin(steps=1)
    with pytest.raises(UserError, match="holds a run already; go on with it by --resume"):
        begin(steps=1)
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is gone"):
        begin(steps=1)


def test_a_folder_in_use_is_refused(begin, tmp_path, whole_run):
    run = tmp_path / "run"
    run.mkdir()
    with FolderLock(run / ".lock", "busy"), pytest.raises(UserError, match="another process is working"):
        begin()
    with runs.lock(whole_run), pytest.raises(UserError, match="another process is working"):
        resume(whole_run, {})


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    with pytest.raises(UserError, match=r"no run .* leaving out --resume"):
        resume(tmp_path / "run", {})
    with pytest.raises(UserError, match="no run"):
        resume(tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_record_is_named(begin, tmp_path):
    begin(steps=1)
    for text in ("", "[]", "{}", '{"format_version": 99}'):
        (tmp_path / "run" / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json: "):
            resume(tmp_path / "run", {})


def test_a_finished_run_is_left_as_it_is(begin, tmp_path):
    begin(steps=2)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    said = Said()
    outcome = resume(tmp_path / "run", {}, say=said)
    assert "finished already, 2 steps" in said.text
    assert (outcome.step, outcome.loss) == (2, None)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


# Going on


@pytest.fixture
def stopped_run(tmp_path, whole_run):
    """The whole run as it was after step 6, its metrics some steps ahead."""
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    stop_after(run, 6)
    return run


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
    with pytest.raises(UserError, match=r"gone: no dataset.*moved, say where by --shards"):
        resume(stopped_run, {})
    resume(stopped_run, {"shards": moved}, say=Said())
    assert weights(stopped_run, 12) == weights(whole_run, 12)


@pytest.mark.parametrize(
    ("name", "value", "sides"),
    [
        ("learning_rate", 1e-3, "in the run: 0.0005, on the command line: 0.001"),
        ("seq_len", 8, "in the run: 16, on the command line: 8"),
        ("layout", "pad", "in the run: concat, on the command line: pad"),
        ("order", "sequential", "in the run: shuffled, on the command line: sequential"),
        ("seed", 1, "in the run: 42, on the command line: 1"),
        ("global_batch", 4, "in the run: 8, on the command line: 4"),
        ("steps", 13, "in the run: 12, on the command line: 13"),
        ("epochs", 2, "in the run: None, on the command line: 2"),
        ("hidden_size", 32, "in the run: 16, on the command line: 32"),
        ("dropout", 0.0, "in the run: 0.1, on the command line: 0.0"),
        ("dtype", "bf16", "in the run: fp32, on the command line: bf16"),
        ("warmup_steps", 2, "in the run: 0, on the command line: 2"),
        ("beta2", 0.95, "in the run: 0.999, on the command line: 0.95"),
    ],
)
def test_what_would_make_another_run_is_refused_with_both_sides(stopped_run, name, value, sides):
    before = (stopped_run / "config.json").read_bytes()
    with pytest.raises(UserError) as error:
        resume(stopped_run, {name: value})
    assert f"{name} ({sides})" in str(error.value)
    remedy = "start a new run in another --run" if name == "hidden_size" else f"--allow-change {name}"
    assert remedy in str(error.value)
    assert (stopped_run / "config.json").read_bytes() == before
    assert (name in CHANGEABLE) is (name != "hidden_size")


def test_another_dataset_is_refused_unless_it_is_asked_for(stopped_run, other_dataset):
    here = ShardSet.open(other_dataset).manifest.fingerprint[:12]
    there = RunRecord.read(stopped_run).dataset[:12]
    with pytest.raises(UserError, match=rf"dataset \(in the run: {there}, on the command line: {here}\)"):
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
    assert outcome.cursor == n
    assert outcome.total_steps == 3 + math.ceil((n - 24) / 5)
    assert [record["position"] for record in metrics(run)][2:5] == [24, 29, 34]
    stop_after(run, 6)
    assert resume(run, {}, say=Said()).total_steps == outcome.total_steps


def test_steps_and_epochs_take_each_others_place(stopped_run):
    outcome = resume(stopped_run, {"epochs": 1}, allow_change={"epochs"}, say=Said())
    told = RunRecord.read(stopped_run).options
    assert (told["epochs"], told["steps"]) == (1, None)
    assert outcome.total_steps == outcome.step > 12


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
    assert outcome.cursor == n
    assert metrics(tmp_path / "run")[0]["position"] == first + 8
    assert f"beginning at window {first}" in said.text
    for stop in (3, 0):
        stop_after(tmp_path / "run", stop)
        assert resume(tmp_path / "run", {}, say=Said()) == outcome


def test_the_cursor_can_be_moved_by_hand(begin, tmp_path, small_dataset):
    run = tmp_path / "run"
    windows = open_windows(ShardSet.open(small_dataset), layout="concat", seq_len=16)
    place = windows.window_of("text-00001", 200)
    begin(order="sequential", steps=None, epochs=2, keep=0)
    stop_after(run, 3)
    moved = resume(run, {"resume_from": "text-00001:200"}, say=Said())
    assert [record["position"] for record in metrics(run)][2:4] == [24, place + 8]
    assert moved.total_steps == 3 + math.ceil((2 * len(windows) - place) / 8)
    assert moved.cursor == 2 * len(windows)
    assert RunRecord.read(run).changes == (Change(step=3, name="cursor", old=24, new=place),)
    there = metrics(run)
    for stop in (6, 3):  # killed later, even before the next checkpoint: it goes on where it was moved to
        stop_after(run, stop)
        assert resume(run, {}, say=Said()) == moved
        assert metrics(run) == there


def test_going_back_before_a_moved_cursor_undoes_the_move(begin, tmp_path):
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
    with pytest.raises(UserError, match="needs --order sequential"):
        resume(stopped_run, {"resume_from": "text-00000:0"})


def test_a_run_is_not_begun_inside_a_dataset(small_dataset):
    before = sorted(small_dataset.iterdir())
    with pytest.raises(UserError, match="is a dataset; take another --run"):
        pretrain(config_of(small_dataset, small_dataset), say=Said())
    assert sorted(small_dataset.iterdir()) == before
