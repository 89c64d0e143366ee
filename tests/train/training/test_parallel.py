"""What ranks do together, and only when they must: gradients once a step, a checkpoint as a whole or not at all."""

import pytest
import torch
from safetensors.torch import load_file

from minimind_data.errors import UserError
from minimind_data.options import options_from
from minimind_train.parallel.world import ALONE, RankPlace, World, torchrun_place
from minimind_train.run import entry
from minimind_train.run.entry import resume
from minimind_train.run.options import PretrainOptions
from minimind_train.run_folder import checkpoint
from minimind_train.training.data_parallel import parallelize
from minimind_train.training.learner import Compute
from minimind_train.training.options import TrainingOptions
from tests.helpers.ranks import TRAIN, run_ranks
from tests.helpers.runs import OPTIONS as SMALL
from tests.helpers.runs import Said, assert_alike

pytestmark = pytest.mark.distributed

COUNT = """
from minimind_train.training import loop
from minimind_train.run import learner as run_learner
from minimind_train.training.data_parallel import parallelize, settle

report["traffic"] = []

def counted(function):
    def counting(*arguments, **keywords):
        report["traffic"].append("scattered")
        return function(*arguments, **keywords)
    return counting

def hook(_, bucket):
    report["traffic"].append("bucket")
    sums = dist.all_reduce(bucket.buffer().div_(size), async_op=True).get_future()
    return sums.then(lambda future: future.value()[0])

def hooked(*arguments, **keywords):
    wrapped = parallelize(*arguments, **keywords)
    if hasattr(wrapped, "register_comm_hook"):
        wrapped.register_comm_hook(None, hook)
    return wrapped

def settled(*arguments):
    settle(*arguments)
    report["traffic"].clear()

run_learner.parallelize, loop.settle = hooked, settled
name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
setattr(dist, name, counted(getattr(dist, name)))
"""


@pytest.mark.parametrize(("parallel", "per_step"), [("ddp", ["bucket"]), ("fsdp", ["scattered"] * 2)])
def test_gradients_travel_in_the_last_pass_of_a_step_alone(tmp_path, small_dataset, parallel, per_step):
    # Two ranks, four windows each, one a pass: four passes a step. Sharded, one layer and what is around it travel each by itself.
    options = {**SMALL, "run": tmp_path / "run", "shards": small_dataset, "micro_batch": 1, "steps": 3}
    reports = run_ranks(COUNT + TRAIN, 2, options=options | {"parallel": parallel})
    assert all(each["traffic"] == per_step * 3 for each in reports)
    entry.begin(options_from(PretrainOptions, options | {"run": tmp_path / "alone"}), Said())
    assert_alike(tmp_path / "run", tmp_path / "alone", 3)


FULL = """
import errno
from minimind_train.run_folder import checkpoint

original = checkpoint.save_file

def full(tensors, path):
    if world.rank == 1 and len(list(path.parent.parent.glob("step-00000000?"))) == 1:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    original(tensors, path)

checkpoint.save_file = full
try:
    train(world, options)
except ValueError as error:
    report["said"] = str(error)
except RuntimeError as error:  # the other rank was first to leave, in the middle of a collective of the step
    report["said"] = f"lost the others: {error}"
    leave()
"""


def test_a_part_that_cannot_be_written_is_no_checkpoint_and_every_rank_says_so(tmp_path, small_dataset):
    options = {**SMALL, "run": tmp_path / "run", "shards": small_dataset, "parallel": "fsdp", "keep": 0}
    reports = run_ranks(FULL, 2, options=options)
    for each in reports:
        assert "step-000000006: the checkpoint could not be written (No space left on device)" in each[
            "said"
        ] or ("lost the others" in each["said"])
    assert any("make room on the disk" in each["said"] for each in reports)
    assert checkpoint.steps_of(tmp_path / "run") == [3]
    names = {path.name for path in checkpoint.folder_of(tmp_path / "run", 3).iterdir()}
    parts = {f"{kind}-0000{rank}-of-00002.safetensors" for kind in ("model", "optimizer") for rank in (1, 2)}
    assert names == parts | {"state.json"}
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-000000003"}
    resume(tmp_path / "run", {"parallel": "ddp"}, say=Said())
    entry.begin(options_from(PretrainOptions, options | {"run": tmp_path / "alone"}), Said())
    assert_alike(tmp_path / "run", tmp_path / "alone", 12)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_sharded_runs_take_every_optimizer(tmp_path, small_dataset, optimizer):
    options = {
        **SMALL,
        "run": tmp_path / "run",
        "shards": small_dataset,
        "steps": 4,
        "optimizer": optimizer,
        "hidden_size": 32,
    }
    run_ranks(TRAIN, 3, options=options | {"parallel": "fsdp"})
    entry.begin(options_from(PretrainOptions, options | {"run": tmp_path / "alone"}), Said())
    # Muon multiplies in bf16.
    assert_alike(tmp_path / "run", tmp_path / "alone", 4, rel=1e-3 if optimizer == "muon" else 1e-5)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_in_bf16_sharded_or_not_it_learns_much_the_same(tmp_path, small_dataset, parallel):
    # Between the steps it writes, which all ranks must do together, and must not disturb what they learn.
    options = {**SMALL, "run": tmp_path / "run", "shards": small_dataset, "steps": 4, "dtype": "bf16"}
    run_ranks(TRAIN, 2, options=options | {"parallel": parallel, "sample_every": 1, "sample_tokens": 5})
    entry.begin(options_from(PretrainOptions, options | {"run": tmp_path / "alone"}), Said())
    assert_alike(tmp_path / "run", tmp_path / "alone", 4, rel=3e-3)
    folder = checkpoint.folder_of(tmp_path / "run", 4)
    for path in folder.glob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}


def test_alone_nothing_is_asked_or_wrapped():
    module = torch.nn.Linear(2, 2)
    assert parallelize(module, Compute(device=torch.device("cpu"), dtype="fp32"), "fsdp") is module
    assert ALONE.all_reduce_sum((0.1, 7)) == [0.1, 7]
    assert ALONE.all_gather("a") == ["a"]
    assert ALONE.broadcast("a") == "a"
    assert ALONE.agreed_stop(None) is None


def test_torchrun_says_who_a_process_is(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert torchrun_place() is None
    given = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError, match=r"but not which \(RANK=5, WORLD_SIZE=8, MASTER_ADDR=, MASTER_PORT=\)"
    ):
        torchrun_place()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert torchrun_place() == RankPlace(rank=5, size=8, local_rank=1, local_size=4)
    monkeypatch.setenv("RANK", "8")
    with pytest.raises(UserError, match="start it by torchrun"):
        torchrun_place()


def test_every_rank_has_a_device_of_its_own_or_says_that_there_is_none(monkeypatch):
    chosen = []
    monkeypatch.setattr(
        "minimind_train.parallel.world.resolve_device",
        lambda name: torch.device("cpu" if name == "cpu" else "cuda"),
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    world = World(RankPlace(rank=3, size=4, local_rank=1, local_size=2))  # the second machine's second
    assert world.device("cpu") == torch.device("cpu")
    assert chosen == []
    assert world.device("auto") == torch.device("cuda:1")
    assert chosen == [1]
    with pytest.raises(
        UserError, match="`device` cuda:1: 4 processes learn together each on a CUDA device of its own"
    ):
        world.device("cuda:1")
    with pytest.raises(UserError, match="4 processes on a machine with 2 cuda devices"):
        World(RankPlace(rank=0, size=4, local_rank=0, local_size=4)).device("cuda")


def test_a_batch_that_is_smaller_than_the_ranks_is_refused_before_anything_is_written(
    tmp_path, small_dataset
):
    options = {**SMALL, "run": tmp_path / "run", "shards": small_dataset, "global_batch": 2, "micro_batch": 1}
    source = "try:\n    train(world, options)\nexcept ValueError as error:\n    report['said'] = str(error)"
    reports = run_ranks(source, 3, options=options)
    assert {each["said"] for each in reports} == {
        "`global_batch` 2 has no sample for some of 3 processes; take a larger one, or fewer processes"
    }
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="`nproc` must be from 1 to 1024"):
        TrainingOptions(nproc=0)
