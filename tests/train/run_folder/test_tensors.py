"""Tensors in parts are the tensors: all of them, and any of their rows."""

import pytest
import torch
from safetensors.torch import save_file

from minimind_train.run_folder.tensors import StoredTensors, named_parts

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
