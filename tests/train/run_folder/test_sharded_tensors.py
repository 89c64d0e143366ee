"""Tensors of which each rank holds some rows: the files of all ranks together are a checkpoint, for any other number of ranks."""

import contextlib

import pytest
import torch
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from minimind_data.errors import UserError
from minimind_train.run_folder.tensors import (
    StoredTensors,
    put_optimizer_state,
    put_weights,
    tensors_of,
)

WEIGHT, MATRIX = torch.arange(7.0), torch.arange(21.0).view(7, 3)


@contextlib.contextmanager
def as_rank(rank, size):
    """A process group in which this process is one of several ranks, and nothing is ever sent."""
    distributed.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (size,))
    finally:
        distributed.destroy_process_group()


def model_of(mesh, fill=None):
    """A model of which this rank holds its block of rows, a frozen weight, and what learns it, after a step."""

    def shard(tensor):
        blocks = tensor.chunk(mesh.size())
        rank = mesh.get_local_rank()
        rows = blocks[rank] if rank < len(blocks) else tensor[:0]
        rows = rows.clone() if fill is None else torch.full_like(rows, fill)
        return DTensor.from_local(
            rows, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride()
        )

    model = nn.Module()
    model.matrix, model.weight = nn.Parameter(shard(MATRIX)), nn.Parameter(shard(WEIGHT))
    model.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = torch.optim.AdamW([model.weight, model.matrix])
    for parameter, tensor in ((model.matrix, MATRIX), (model.weight, WEIGHT)):
        optimizer.state[parameter] = {
            "step": torch.tensor(4.0 if fill is None else fill),
            "exp_avg": shard(tensor + 100),
        }
    return model, optimizer


def rows_of(tensor):
    return tensor.to_local().tolist()


@pytest.fixture(params=[1, 2, 3, 5])
def folder(request, tmp_path):
    """The files that so many ranks have written; of seven rows five ranks hold 2, 2, 2, 1 and 0."""
    for rank in range(request.param):
        with as_rank(rank, request.param) as mesh:
            for name, tensors in tensors_of(*model_of(mesh)).items():
                assert name.endswith(f"-{rank + 1:05d}-of-{request.param:05d}.safetensors")
                save_file(tensors, tmp_path / name)
    return tmp_path


def test_files_hold_the_rows_of_their_rank(tmp_path):
    with as_rank(1, 3) as mesh:
        files = tensors_of(*model_of(mesh))
    assert list(files) == ["model-00002-of-00003.safetensors", "optimizer-00002-of-00003.safetensors"]
    weights, state = files.values()
    assert {name: tensor.tolist() for name, tensor in weights.items()} == {
        "matrix@3": MATRIX[3:6].tolist(),
        "weight@3": [3.0, 4.0, 5.0],
    }
    assert state.keys() == {"step.matrix", "exp_avg.matrix@3", "step.weight", "exp_avg.weight@3"}
    with as_rank(4, 5) as mesh:
        weights, state = tensors_of(*model_of(mesh)).values()
    assert weights == {}, "no row is left for the last one"
    assert state.keys() == {"step.matrix", "step.weight"}


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_any_number_of_ranks_reads_them(folder, size):
    weights = StoredTensors(sorted(folder.glob("model-*")))
    state = StoredTensors(sorted(folder.glob("optimizer-*")))
    assert weights.shapes == {"matrix": [7, 3], "weight": [7]}
    assert torch.equal(weights.whole("matrix"), MATRIX)
    for rank in range(size):
        with as_rank(rank, size) as mesh:
            expected, former = model_of(mesh)
            model, optimizer = model_of(mesh, fill=-1.0)
            put_weights(folder, model, weights)
            put_optimizer_state(optimizer, model, state)
            for name, parameter in model.named_parameters():
                if name == "frozen":
                    continue
                wanted = dict(expected.named_parameters())[name]
                assert rows_of(parameter) == rows_of(wanted)
                assert optimizer.state[parameter]["step"] == 4
                average = optimizer.state[parameter]["exp_avg"]
                assert rows_of(average) == rows_of(former.state[wanted]["exp_avg"])
                assert average.shape == parameter.shape


def test_a_model_of_another_shape_is_refused(folder):
    with as_rank(0, 2) as mesh:
        model, _ = model_of(mesh)
        model.more = nn.Parameter(torch.zeros(3))
        with pytest.raises(UserError, match=r"more is absent in the checkpoint and \[3\] in this model"):
            put_weights(folder, model, StoredTensors(sorted(folder.glob("model-*"))))
