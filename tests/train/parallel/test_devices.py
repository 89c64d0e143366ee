"""Which device `auto` is."""

import pytest
import torch

from minimind_train.parallel.devices import resolve_device
from minimind_train.parallel.world import RankPlace, World


@pytest.fixture
def machine(monkeypatch):
    """Say which GPUs there are."""

    def machine(*, cuda, mps):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return machine


@pytest.mark.parametrize(
    ("cuda", "mps", "device"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_gpu_that_there_is(machine, cuda, mps, device):
    machine(cuda=cuda, mps=mps)
    assert resolve_device("auto") == torch.device(device)


def test_several_processes_share_no_apple_gpu(machine):
    machine(cuda=False, mps=True)
    ranks = World(RankPlace(rank=0, size=2, local_rank=0, local_size=2))
    assert ranks.device("auto") == torch.device("cpu")
    assert World(RankPlace(rank=0, size=1, local_rank=0, local_size=1)).device("auto") == torch.device("mps")
