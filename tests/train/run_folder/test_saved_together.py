"""A checkpoint that several ranks write together: one folder with the files of all, or none. Here the ranks are threads."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from minimind_data.errors import UserError
from minimind_train.parallel.world import RankPlace, World
from minimind_train.run_folder import checkpoint
from tests.helpers.checkpoints import state

SIZE = 3


class ThreadWorld(World):
    """Ranks that are threads and meet at a barrier, where each leaves a value and takes those of all."""

    def __init__(self, rank, values, barrier):
        super().__init__(RankPlace(rank=rank, size=SIZE, local_rank=rank, local_size=SIZE))
        self.values, self.meeting = values, barrier

    def all_gather(self, value):
        self.values[self.rank] = value
        self.meeting.wait(10)
        values = list(self.values)
        self.meeting.wait(10)
        return values

    def broadcast(self, value):
        assert (value is None) is not self.is_main
        value = self.all_gather(value)[0]
        if isinstance(value, UserError):
            raise value
        return value

    @contextlib.contextmanager
    def relaying_errors(self):
        try:
            yield
        except UserError as error:
            self.all_gather(error)
            raise


def tensors_of_rank(rank):
    return {
        f"{kind}-{rank + 1:05d}-of-{SIZE:05d}.safetensors": {f"w@{rank}": torch.full((1, 2), float(rank))}
        for kind in ("model", "optimizer")
    }


def save_together(run, step=4):
    """What each rank gets from a save: the folder, or the error."""
    values, barrier = [None] * SIZE, threading.Barrier(SIZE)

    def save(rank):
        try:
            return checkpoint.save(
                run, state(step), tensors_of_rank(rank), world=ThreadWorld(rank, values, barrier)
            )
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(SIZE) as threads:
        return list(threads.map(save, range(SIZE)))


def names_in(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_files_of_all_ranks_are_one_checkpoint(tmp_path):
    folder = checkpoint.folder_of(tmp_path, 4)
    assert save_together(tmp_path) == [folder] * SIZE
    found = checkpoint.load(tmp_path, 4)
    expected = sorted(name for rank in range(SIZE) for name in tensors_of_rank(rank))
    assert sorted(found.files) == expected
    assert sorted(path.name for path in folder.iterdir()) == [*expected, "state.json"]
    assert found.state == state(4)
    assert names_in(tmp_path) == ["step-000000004"]


@pytest.mark.parametrize("rank", range(SIZE))
def test_where_one_rank_cannot_write_none_has_a_checkpoint(tmp_path, monkeypatch, rank):
    save_together(tmp_path, step=2)
    real = checkpoint.save_file

    def save_file(tensors, path):
        if f"optimizer-{rank + 1:05d}" in path.name:
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    said = save_together(tmp_path)
    assert len(set(said)) == 1
    assert "step-000000004: the checkpoint could not be written (No space left on device)" in said[0]
    assert names_in(tmp_path) == ["step-000000002"]
    assert checkpoint.load(tmp_path, 2).state == state(2)


def test_where_the_folder_cannot_be_made_all_ranks_say_so(tmp_path):
    (tmp_path / "checkpoints").touch()
    said = save_together(tmp_path)
    assert len(set(said)) == 1
    assert "step-000000004: the checkpoint could not be written (" in said[0]


def test_where_the_last_file_cannot_be_written_all_ranks_say_so(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "write_checked", refuse)
    said = save_together(tmp_path)
    assert len(set(said)) == 1
    assert "(Input/output error); mend that and go on with `resume`" in said[0]
    assert names_in(tmp_path) == []
