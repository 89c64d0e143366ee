"""When a run saves, what stays, and that the training goes on meanwhile."""

import errno
import resource
import threading
from dataclasses import replace

import pytest
import torch

from minimind_data.errors import UserError
from minimind_data.files import read_checked, write_checked
from minimind_train.parallel.world import ALONE, RankPlace, World
from minimind_train.run.entry import resume
from minimind_train.run_folder import checkpoint
from minimind_train.run_folder.checkpoint import CheckpointState
from minimind_train.run_folder.options import SaveOptions
from minimind_train.run_folder.saver import Retention, Saver, Snapshot
from minimind_train.run_folder.tensors import tensors_of
from minimind_train.weights.loading import model_of
from tests.helpers.checkpoints import bits, make, state, train
from tests.helpers.runs import Said, metrics


class Training:
    """A model that learns, and a saver that is told of each step."""

    def __init__(self, run, writers=ALONE, **options):
        self.run = run
        self.model, self.optimizer = make()
        self.said = Said()
        self.synced = []
        self.saver = Saver(
            run,
            SaveOptions(**{"save_every": 0, **options}),
            Snapshot(
                tensors=lambda: tensors_of(self.model, self.optimizer),
                state=self.state,
                flush=lambda: self.synced.append(threading.current_thread().name),
            ),
            writers=writers,
            say=self.said,
        )

    @staticmethod
    def state(record):
        loss = record.get("val_loss")
        return CheckpointState(
            step=record["step"],
            position=record["step"] * 8,
            config={},
            dataset="abc",
            metrics_lines=0,
            val_loss=loss,
            val_on=None if loss is None else "these",
        )

    def step(self, number, *, leaving=False, **measured):
        train(self.model, self.optimizer, [number])
        self.saver.after_step({"step": number, **measured}, leaving=leaving)

    def go(self, num_steps, losses=None):
        with self.saver:
            for step in range(1, num_steps + 1):
                loss = (losses or {}).get(step)
                self.step(step, leaving=step == num_steps, **({} if loss is None else {"val_loss": loss}))
        return checkpoint.steps_of(self.run)


@pytest.mark.parametrize(
    ("options", "saved"),
    [
        ({}, [7]),
        ({"save_every": 2}, [2, 4, 6, 7]),
        ({"save_every": 9}, [7]),
        ({"keep_every": 3}, [3, 6, 7]),
        ({"save_every": 2, "keep": 1}, [7]),
        ({"save_every": 2, "keep": 2, "keep_every": 3}, [3, 6, 7]),
        ({"save_every": 1, "keep": 1, "keep_every": 2}, [2, 4, 6, 7]),
    ],
)
def test_what_is_saved_and_what_stays(tmp_path, options, saved):
    assert Training(tmp_path, **{"keep": 0, **options}).go(7) == saved


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ({1: 3.0, 3: 2.0, 5: 2.5}, 3),
        ({1: 3.0, 3: 2.0, 5: 2.0}, 3),
        ({1: 3.0, 3: 4.0, 5: 5.0}, 1),
        ({1: 3.0, 3: 2.0, 5: 1.0}, 5),
    ],
)
def test_the_best_is_saved_when_it_comes_and_stays(tmp_path, losses, best):
    training = Training(tmp_path, save_best=True, save_every=4, keep=1)
    assert training.go(8, losses) == [best, 8]
    assert checkpoint.load_best(tmp_path).state.step == best


def test_without_save_best_nothing_is_saved_or_kept_for_a_loss(tmp_path):
    assert Training(tmp_path, save_every=3, keep=1).go(6, {1: 3.0, 3: 2.0}) == [6]
    with pytest.raises(UserError, match="no checkpoint has a validation loss.*`save_best`"):
        checkpoint.load_best(tmp_path)


def test_losses_on_different_things_are_not_compared(tmp_path):
    for step, on in ((1, "those"), (2, "these"), (3, "these")):
        told = CheckpointState(
            step=step, position=0, config={}, dataset="", metrics_lines=0, val_loss=float(step), val_on=on
        )
        checkpoint.save(tmp_path, told, tensors_of(*make()))
    assert checkpoint.load_best(tmp_path).state.step == 2
    assert checkpoint.best_of(tmp_path, measured_on="those").step == 1
    assert checkpoint.best_of(tmp_path, measured_on="others") is None


def test_the_best_is_looked_for_among_what_was_measured_up_to_a_step_on_what_was_measured_last(tmp_path):
    measured = {1: (3.0, "those"), 2: (2.0, "those"), 3: (2.0, "those"), 4: (5.0, "these"), 5: (None, None)}
    for step, (loss, on) in measured.items():
        own = replace(state(step), val_loss=loss, val_on=on)
        checkpoint.save(tmp_path, own, tensors_of(*make()))

    def best(**given):
        found = checkpoint.best_of(tmp_path, **given)
        return None if found is None else found.step

    assert [best(last_step=step) for step in range(6)] == [None, 1, 2, 2, 4, 4]
    assert [best(last_step=step, measured_on="those") for step in range(6)] == [None, 1, 2, 2, 2, 2]
    assert best(last_step=3, measured_on="these") is None
    assert best() == 4


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 4]), (1, [4]), (3, [2, 3, 4]), (9, [1, 2, 3, 4])])
def test_so_many_stay(tmp_path, keep, left):
    for step in range(1, 5):
        checkpoint.save(tmp_path, state(step), tensors_of(*make()))
    Retention(newest=keep).apply(tmp_path, newest=4)
    assert checkpoint.steps_of(tmp_path) == left
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(left)


def test_three_stay_where_nothing_is_asked_for(tmp_path):
    for step in range(1, 6):
        told = replace(state(step), val_loss=float(step), val_on="these")
        checkpoint.save(tmp_path, told, tensors_of(*make()))
    Retention().apply(tmp_path, newest=5)
    assert checkpoint.steps_of(tmp_path) == [3, 4, 5]


def test_a_rank_that_does_not_write_saves_nothing(tmp_path):
    training = Training(tmp_path, save_every=1, writers=None)
    assert training.go(2) == []
    assert training.synced == []


def test_only_the_first_rank_deletes_what_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save", lambda *_, **__: None)
    for rank, left in ((1, [1, 2]), (0, [2])):
        run = tmp_path / str(rank)
        run.mkdir()
        for step in (1, 2):
            checkpoint.folder_of(run, step).mkdir(parents=True)
        writers = World(RankPlace(rank=rank, size=1, local_rank=rank, local_size=1))
        assert Training(run, save_every=2, keep=1, writers=writers).go(2) == left


class Gate:
    """Holds the writing of checkpoints until it is opened."""

    def __init__(self, monkeypatch):
        self.reached, self.open = threading.Event(), threading.Event()
        real = checkpoint.save_file

        def save_file(*arguments):
            self.reached.set()
            assert self.open.wait(30)
            real(*arguments)

        monkeypatch.setattr(checkpoint, "save_file", save_file)


def test_the_training_goes_on_while_a_checkpoint_is_written_which_is_that_of_its_step(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    training = Training(tmp_path, save_every=4)
    training.step(4)
    there = bits(training.model, training.optimizer)
    assert gate.reached.wait(30)
    for step in (5, 6, 7):
        training.step(step)
    assert checkpoint.steps_of(tmp_path) == []
    gate.open.set()
    training.saver.wait()
    other = make(seed=1)
    checkpoint.load(tmp_path, 4).restore(*other)
    assert bits(*other) == there != bits(training.model, training.optimizer)
    assert training.synced == ["checkpoint"], (
        "metrics reach the disk in the thread, before the checkpoint's name"
    )


def test_one_save_is_in_flight_at_most(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    training = Training(tmp_path, save_every=1, keep=0)
    training.step(1)
    (writing,) = (thread for thread in threading.enumerate() if thread.name == "checkpoint")
    assert writing.daemon, "a program that ends does not wait for it"
    opener = threading.Timer(0.2, gate.open.set)
    opener.start()
    training.step(2)
    assert gate.open.is_set(), "the second save waited for the first"
    assert checkpoint.steps_of(tmp_path)[:1] == [1]
    training.saver.wait()
    assert checkpoint.steps_of(tmp_path) == [1, 2]
    opener.join()


def test_the_copies_keep_their_memory(tmp_path, monkeypatch):
    places, real = [], checkpoint.save_file

    def save_file(tensors, path):
        places.append((path.name, {name: copy.data_ptr() for name, copy in tensors.items()}))
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    training = Training(tmp_path, save_every=1)
    training.step(1)
    training.step(2)
    training.saver.wait()
    assert [name for name, _ in places] == ["model.safetensors", "optimizer.safetensors"] * 2
    assert places[:2] == places[2:]
    own = {tensor.data_ptr() for tensor in training.model.parameters()}
    assert not own & set(places[0][1].values())


def broken(monkeypatch, number=1):
    calls = []
    real = checkpoint.save_file

    def save_file(*arguments):
        calls.append(1)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", save_file)


def test_a_save_that_fails_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
    broken(monkeypatch, 3)
    training = Training(tmp_path, save_every=2)
    done = []

    def go():
        with training.saver:
            for step in range(1, 8):
                training.step(step)
                done.append(step)
                for thread in threading.enumerate():
                    if thread.name == "checkpoint":
                        thread.join()

    with pytest.raises(UserError, match=r"step-000000004: .*No space left.*make room"):
        go()
    assert done == [1, 2, 3, 4]
    assert checkpoint.steps_of(tmp_path) == [2]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000002"]


def test_a_last_save_that_fails_is_an_error_of_the_run(tmp_path, monkeypatch):
    broken(monkeypatch)
    training = Training(tmp_path)
    with pytest.raises(UserError, match="No space left"):
        training.go(2)
    broken(monkeypatch)
    training = Training(tmp_path, save_every=2)
    with pytest.raises(UserError, match="No space left"), training.saver:
        training.step(2)


def test_beside_another_error_a_failed_save_is_told(tmp_path, monkeypatch):
    broken(monkeypatch)
    training = Training(tmp_path, save_every=2)

    def go():
        with training.saver:
            training.step(2)
            raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        go()
    assert "No space left" in training.said.text


def test_an_error_of_the_training_lets_the_save_end_and_an_interrupt_does_not(tmp_path, monkeypatch):
    for error, saved in ((ValueError, [2]), (KeyboardInterrupt, [])):
        with monkeypatch.context() as patch:
            gate = Gate(patch)
            run = tmp_path / error.__name__
            run.mkdir()
            opener = threading.Timer(0.1, gate.open.set)

            def go(run, error, gate=gate, opener=opener):
                training = Training(run, save_every=2)
                with training.saver:
                    training.step(2)
                    assert gate.reached.wait(30)
                    opener.start()
                    raise error

            with pytest.raises(error):
                go(run, error)
            opener.join()
        assert checkpoint.steps_of(run) == saved
        assert len(list((run / "checkpoints").iterdir())) == len(saved)


@pytest.mark.parametrize("limit_bytes", [100, 20_000])
def test_a_disk_that_fills_up_behind_the_trainings_back_costs_that_checkpoint_alone(tmp_path, limit_bytes):
    training = Training(tmp_path, save_every=1)
    training.step(1)
    training.saver.wait()
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, former[1]))
    try:
        training.step(2)
        with pytest.raises(UserError, match=r"step-000000002: the checkpoint could not be written"):
            training.saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000001"]
    assert checkpoint.load_latest(tmp_path, pytest.fail).state.step == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_copies_from_a_gpu_are_those_of_their_step(tmp_path):
    training = Training(tmp_path, save_every=1)
    training.model.cuda()
    training.optimizer = torch.optim.AdamW(training.model.parameters(), lr=0.1)
    data = torch.arange(12, device="cuda").reshape(2, 6)

    def step():
        training.optimizer.zero_grad()
        training.model.logits(training.model(data)).logsumexp(-1).sum().backward()
        training.optimizer.step()

    step()
    there = {name: tensor.cpu().clone() for name, tensor in training.model.state_dict().items()}
    training.saver.after_step({"step": 1}, leaving=False)
    for _ in range(20):  # queued behind the copies
        step()
    training.saver.wait()
    other = make(seed=1)[0]
    checkpoint.load(tmp_path, 1).restore(other)
    assert all(torch.equal(tensor, there[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("name", ["save_every", "keep", "keep_every"])
@pytest.mark.parametrize("value", [-1, 10**18])
def test_impossible_options_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        SaveOptions(**{name: value})


def test_the_best_of_before_a_resume_is_still_the_best_and_is_found_by_name(begin, tmp_path, other_dataset):
    run = tmp_path / "run"
    measured = {
        "val_shards": str(other_dataset),
        "val_every": 2,
        "save_every": 0,
        "keep": 1,
        "save_best": True,
    }
    begin(**measured, learning_rate=0.01, steps=6)
    worse = {"learning_rate": 10.0, "steps": 12}
    resume(run, worse, allow_change=worse.keys(), say=Said())
    losses = {line["step"]: line["val_loss"] for line in metrics(run) if "val_loss" in line}
    best = min(losses, key=losses.__getitem__)
    assert best <= 6
    assert checkpoint.steps_of(run) == [best, 12]
    assert checkpoint.load_best(run).state.val_loss == losses[best]
    expected = make(config=model_of(run, step=best, say=pytest.fail).config)[0]
    checkpoint.load(run, best).restore(expected)
    found = model_of(run, step="best", say=pytest.fail)
    assert all(map(torch.equal, found.parameters(), expected.parameters()))


def test_the_best_needs_something_to_be_measured_on(begin, tmp_path):
    with pytest.raises(UserError, match="`save_best` needs .* pass `val_shards`"):
        begin(save_best=True)
    assert not (tmp_path / "run").exists()


def test_what_was_skipped_is_counted_on_after_a_resume(stopped_run):
    path = checkpoint.folder_of(stopped_run, 6) / "state.json"
    content = read_checked(path, key="sha256")
    write_checked(path, {**content, "skipped_steps": 2}, key="sha256")
    resume(stopped_run, {}, say=Said())
    assert [line.get("skipped_steps") for line in metrics(stopped_run)] == [None] * 6 + [2] * 6
    assert checkpoint.load(stopped_run, 12).state.skipped_steps == 2


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_usual_one_is_waited_for(tmp_path):
    there = torch.device("cuda:1")
    big, order = torch.zeros(2**28, device=there), torch.randn(4096, 4096, device=there)
    saver = Saver(tmp_path, SaveOptions(), Snapshot(tensors=dict, state=Training.state), say=Said())
    for _ in range(20):
        order = order @ order
    big.add_(1)
    copies, arrived = saver._copy({"file": {"big": big}})
    arrived()
    assert copies["file"]["big"].min() == 1
