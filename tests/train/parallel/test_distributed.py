"""Several ranks are one run: the same losses and weights to rounding, whatever their number and however the batch divides."""

import pytest

from minimind_data.options import options_from
from minimind_train.run import entry
from minimind_train.run.options import PretrainOptions
from minimind_train.run_folder import checkpoint
from tests.helpers.ranks import TRAIN, run_ranks
from tests.helpers.runs import OPTIONS as SMALL
from tests.helpers.runs import Said, assert_alike, metrics

pytestmark = pytest.mark.distributed

# Of 99 windows the last batch of 14 has one, so all ranks but one have nothing in it; and in the others three ranks have 5, 5 and 4,
# so with a micro-batch of 4 one of them passes once where the others pass twice.
OPTIONS = {"steps": None, "epochs": 1, "global_batch": 14, "micro_batch": 4, "save_every": 3, "keep": 0}
STEPS = 8


def options_of(run, dataset, **changes):
    return {**SMALL, **OPTIONS, "run": run, "shards": dataset, **changes}


@pytest.fixture(
    scope="module",
    params=[{}, {"use_moe": True, "num_experts": 4, "num_experts_per_tok": 1, "seq_aux": True}],
    ids=["dense", "experts"],
)
def alone(request, tmp_path_factory, small_dataset, other_dataset):
    """A run in one process, and its options."""
    run = tmp_path_factory.mktemp("alone") / "run"
    options = options_of(run, small_dataset, val_shards=str(other_dataset), val_every=3, **request.param)
    entry.begin(options_from(PretrainOptions, options), Said())
    return run, options


@pytest.mark.parametrize(("parallel", "size"), [("ddp", 2), ("ddp", 3), ("fsdp", 2), ("fsdp", 3)])
def test_any_number_of_ranks_learns_the_same(tmp_path, alone, parallel, size):
    expected, options = alone
    reports = run_ranks(TRAIN, size, options=options | {"run": tmp_path / "run", "parallel": parallel})
    assert_alike(tmp_path / "run", expected, STEPS)
    outcomes = [each["outcome"] for each in reports]
    assert [outcome.rank for outcome in outcomes] == list(range(size))
    assert len({(outcome.step, outcome.position, outcome.loss) for outcome in outcomes}) == 1


KILLED = """
def dying(batch):
    if batch.start // options["global_batch"] == 5:
        leave()

before_each_step(dying)
train(world, options)
"""


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_three_ranks_that_die_and_go_on_end_bit_for_bit_as_three_that_live(tmp_path, small_dataset, parallel):
    whole, killed = (
        options_of(tmp_path / name, small_dataset, parallel=parallel, dropout=0.1)
        for name in ("whole", "killed")
    )
    run_ranks(TRAIN, 3, options=whole)
    run_ranks(KILLED, 3, options=killed)
    assert len(metrics(tmp_path / "killed")) < STEPS
    run_ranks("train(world, options, given={})", 3, options=killed)
    expected, found = (
        {
            file.name: file.read_bytes()
            for file in checkpoint.folder_of(tmp_path / run, STEPS).glob("*.safetensors")
        }
        for run in ("whole", "killed")
    )
    assert len(expected) >= 2  # weights, and the optimizer's state
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "fp16", "activation_checkpointing": True},
        {"optimizer": "muon"},
    ],
    ids=["fp16", "muon"],
)
def test_sharded_weights_learn_the_same_in_fp16_and_by_muon(tmp_path, small_dataset, options):
    alone, shared = (options_of(tmp_path / name, small_dataset, **options) for name in ("alone", "shared"))
    entry.begin(options_from(PretrainOptions, alone), Said())
    run_ranks(TRAIN, 2, options=shared | {"parallel": "fsdp"})
    ours, theirs = (metrics(tmp_path / name) for name in ("shared", "alone"))
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=1e-3)
    for name in ("loss_scale", "skipped_steps", "position"):
        assert [line.get(name) for line in ours] == [line.get(name) for line in theirs]
