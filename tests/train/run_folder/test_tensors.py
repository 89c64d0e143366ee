"""Tensors in parts are the tensors: all of them, and any of their rows."""

import pytest
import torch
from safetensors.torch import save_file

from minimind_data.errors import UserError
from minimind_train.run_folder.tensors import StoredTensors, named_parts, put_optimizer_state
from tests.helpers.checkpoints import make

TENSOR = torch.arange(21.0).view(7, 3)


@pytest.fixture(params=[(7,), (3, 3, 1), (1,) * 7, (4, 3)])
def stored(request, tmp_path):
    """A tensor cut into parts, in files whose names are in another order than its rows."""
    first = 0
    for number, rows in enumerate(request.param):
        name = "w" if len(request.param) == 1 else f"w@{first}"
        path = tmp_path / f"{9 - number}.safetensors"
        save_file({name: TENSOR[first : first + rows].clone(), "step": torch.tensor(5.0)}, path)
        first += rows
    return StoredTensors(sorted(tmp_path.iterdir()))


def test_a_tensor_is_put_together_from_its_parts(stored):
    assert stored.shapes == {"w": [7, 3], "step": []}
    assert torch.equal(stored.whole("w"), TENSOR)
    assert stored.whole("step") == 5


def test_any_rows_are_read_across_parts(stored):
    for first in range(8):
        for count in range(8 - first):
            rows = stored.rows("w", first, count)
            assert rows.shape == (count, 3)
            assert torch.equal(rows, TENSOR[first : first + count])


def test_a_plain_tensor_keeps_its_name():
    named = named_parts([("w", torch.nn.Parameter(TENSOR).t())])
    assert list(named) == ["w"]
    assert named["w"].is_contiguous()
    assert not named["w"].requires_grad


@pytest.mark.parametrize(
    "tensors",
    [
        {"w@x": TENSOR},
        {"w@": TENSOR},
        {"w@-1": TENSOR},
        {"w@00": TENSOR},
        {"w@9999999999999999999": TENSOR},
        {"w@0": torch.tensor(1.0)},
        {"w": TENSOR.double()},
        {"w": TENSOR.int()},
    ],
)
def test_a_name_or_a_dtype_that_no_checkpoint_has_is_named(tmp_path, tensors):
    save_file(tensors, tmp_path / "t.safetensors")
    with pytest.raises(UserError, match=r"t\.safetensors: w[^ ]* is no tensor of a checkpoint"):
        StoredTensors([tmp_path / "t.safetensors"])


@pytest.mark.parametrize("parts", [{3: 4}, {0: 3, 4: 3}, {0: 4, 3: 4}, {0: 3, 3: -4}])
def test_parts_that_leave_a_gap_or_overlap_are_no_tensor(tmp_path, parts):
    """A negative number of rows stands for rows that are too short."""
    named = {
        f"w@{first}": torch.zeros(count, 3) if count > 0 else torch.zeros(-count, 2)
        for first, count in parts.items()
    }
    save_file(named, tmp_path / "t.safetensors")
    with pytest.raises(UserError, match="the parts of w in the checkpoint do not make one tensor"):
        StoredTensors([tmp_path / "t.safetensors"])


@pytest.mark.parametrize(
    "stored",
    [{"exp_avg.x": (16,)}, {"exp_avg.model.norm.weight": (15,)}, {"exp_avg": (16,)}, {"step.lm": ()}],
)
def test_the_state_of_an_optimizer_is_that_of_the_models_parameters(tmp_path, stored):
    model, optimizer = make()
    save_file({name: torch.zeros(shape) for name, shape in stored.items()}, tmp_path / "o.safetensors")
    with pytest.raises(UserError, match="the checkpoint is of another model"):
        put_optimizer_state(optimizer, model, StoredTensors([tmp_path / "o.safetensors"]))
