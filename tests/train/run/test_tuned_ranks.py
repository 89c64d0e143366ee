"""Runs of sft and dpo on two ranks learn what one process learns, with adapters and with a reference too."""

import pytest

from minimind_data.options import options_from
from minimind_train.run import entry
from minimind_train.run.options import PHASE_OPTIONS
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import Said, metrics

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

OPTIONS = {
    "seq_len": 48, "global_batch": 7, "micro_batch": 2, "steps": 4, "threads": 1, "save_every": 2, "keep": 0, "log_every": 1,
    "dtype": "fp32", "device": "cpu", "learning_rate": 1e-3,
}  # fmt: skip

LEG = 'report["step"] = train(world, options, command=command).step'


@pytest.mark.parametrize(
    ("command", "parallel", "changes"),
    [
        ("dpo", "ddp", {}),
        ("dpo", "fsdp", {"reference": "online"}),
        ("dpo", "ddp", {"lora_rank": 2, "lora_targets": "all"}),
        ("sft", "fsdp", {"lora_rank": 2}),
    ],
)
def test_two_ranks_learn_what_one_learns(
    tmp_path, sft_dataset, dpo_dataset, chat_base, command, parallel, changes
):
    shards = sft_dataset if command == "sft" else dpo_dataset
    options = {**OPTIONS, **changes, "shards": (str(shards),), "val_shards": str(shards), "val_batches": 1}
    options |= {"from_weight": str(chat_base), "parallel": parallel}
    entry.begin(options_from(PHASE_OPTIONS[command], {**options, "run": tmp_path / "one"}), Said())
    reports = run_ranks(LEG, 2, options={**options, "run": tmp_path / "two"}, command=command)
    assert [each["step"] for each in reports] == [4, 4]
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [line.keys() for line in one] == [line.keys() for line in two]
    for expected, found in zip(one, two, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    # Whoever goes on alone goes on from what two have written.
    more = {"steps": 5}
    entry.resume(tmp_path / "two", more, allow_change=("steps",), say=Said())
    entry.resume(tmp_path / "one", more, allow_change=("steps",), say=Said())
    assert metrics(tmp_path / "two")[-1]["loss"] == pytest.approx(
        metrics(tmp_path / "one")[-1]["loss"], rel=1e-3
    )
