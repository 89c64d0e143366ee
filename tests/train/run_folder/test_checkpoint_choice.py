"""A checkpoint of a run that may still be training: the newest, the best, or that of a step; when it goes, a newer one."""

from dataclasses import replace

import pytest

from minimind_data.errors import UserError
from minimind_train.run_folder import checkpoint
from minimind_train.run_folder.checkpoint import GoneCheckpointError
from minimind_train.run_folder.checkpoint_choice import with_checkpoint
from minimind_train.run_folder.tensors import tensors_of
from tests.helpers.checkpoints import make, state
from tests.helpers.runs import Said


@pytest.fixture
def run(tmp_path):
    """A run folder with checkpoints of steps 1 to 3, of which the second has the lowest loss."""
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        own = replace(state(step), val_loss=loss, val_on="these")
        checkpoint.save(tmp_path, own, tensors_of(*make()))
    return tmp_path


@pytest.mark.parametrize(("choice", "step"), [(None, 3), ("best", 2), (1, 1)])
def test_which_checkpoint_is_used(run, choice, step):
    assert with_checkpoint(run, choice, lambda found: ("used", found.state.step), Said()) == ("used", step)


def test_a_damaged_one_is_passed_over_with_a_sentence(run):
    said = Said()
    (checkpoint.folder_of(run, 3) / "model.safetensors").write_bytes(b"")
    assert with_checkpoint(run, None, lambda found: found.state.step, said) == 2
    assert "step-000000003 is damaged" in said.text


def test_before_the_first_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no checkpoint yet; the first comes after `save_every` steps"):
        with_checkpoint(tmp_path, None, lambda _: None, Said())


class Reader:
    """Reads checkpoints that the run deletes meanwhile, the first few of them."""

    def __init__(self, num_gone):
        self.num_gone, self.calls = num_gone, 0

    def __call__(self, found):
        self.calls += 1
        if self.calls <= self.num_gone:
            raise GoneCheckpointError(found.folder)
        return found.state.step


def test_one_that_goes_while_it_is_read_is_tried_again_as_the_newest_one_of_then(run):
    reader = Reader(4)
    assert with_checkpoint(run, None, reader, Said()) == 3
    assert reader.calls == 5
    reader = Reader(100)
    with pytest.raises(GoneCheckpointError, match="deleted while it was read.*larger `keep`"):
        with_checkpoint(run, None, reader, Said())
    assert reader.calls == 5


@pytest.mark.parametrize("choice", ["best", 1])
def test_one_that_was_asked_for_by_name_has_no_other_in_its_place(run, choice):
    reader = Reader(1)
    with pytest.raises(GoneCheckpointError):
        with_checkpoint(run, choice, reader, Said())
    assert reader.calls == 1
