"""Runs in real processes, stopped and killed at random and gone on with in other numbers, see what one process sees, in the same steps."""

import random
import shutil

import numpy as np
import pytest

from minimind_data.dataset.shard_set import ShardSet
from minimind_data.options import options_from
from minimind_data.windows.opening import open_windows
from minimind_train.parallel.interrupt import Stop
from minimind_train.run import entry
from minimind_train.run.options import PretrainOptions
from minimind_train.run_folder import checkpoint
from tests.helpers.rank import before_each_step
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import OPTIONS as SMALL
from tests.helpers.runs import Said, assert_alike

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 20
OPTIONS = {"steps": STEPS, "global_batch": 11, "micro_batch": 4, "save_every": 3, "keep": 0}

# Each rank writes down the tokens of every window that its steps are given. In the step `last` either all are gone, in the way of
# kill -9, or one of them gets a signal; what a stopped run says of its end comes back too.
LEG = """
import signal

report["seen"] = []

def watching(batch):
    number = batch.start // options["global_batch"] + 1
    if number == last and killed:
        leave()
    report["seen"].append((number, [row.numpy().tobytes() for each in batch.micro_batches for row in each["input_ids"]]))
    if number == last and rank == signalled:
        os.kill(os.getpid(), signal.SIGTERM)

before_each_step(watching)
given = None if first else {name: options[name] for name in ("micro_batch", "parallel")}
report["outcome"] = train(world, options, given=given)
"""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, small_dataset):
    """The run of one process, and what it saw: (step, tokens) in the order of positions."""
    run, seen = tmp_path_factory.mktemp("whole") / "run", []

    def watching(batch):
        number = batch.start // OPTIONS["global_batch"] + 1
        seen.extend(
            (number, row.numpy().tobytes()) for each in batch.micro_batches for row in each["input_ids"]
        )

    with pytest.MonkeyPatch.context() as patch:
        before_each_step(watching, patch.setattr)
        entry.begin(
            options_from(PretrainOptions, {**SMALL, **OPTIONS, "run": run, "shards": small_dataset}), Said()
        )
    return run, seen


def test_what_one_process_sees_is_the_order_itself(uninterrupted, small_dataset):
    windows = open_windows(ShardSet.open(small_dataset), layout="concat", seq_len=16)
    rows = windows.fetch(np.arange(len(windows)))["input_ids"]
    numbers = {row.tobytes(): number for number, row in enumerate(rows)}
    assert len(numbers) == len(windows)
    epoch = [numbers[tokens] for _, tokens in uninterrupted[1][: len(windows)]]
    assert sorted(epoch) == list(range(len(windows)))


def in_order(reports):
    """(step, tokens) of all ranks, in the order of positions."""
    seen = []
    for shares in zip(*(each["seen"] for each in reports), strict=True):
        (step,) = {step for step, _ in shares}
        rows = [rows for _, rows in shares]
        seen += [
            (step, rows[rank][place])
            for place in range(max(map(len, rows)))
            for rank in range(len(rows))
            if place < len(rows[rank])
        ]
    return seen


@pytest.mark.parametrize("seed", range(3))
def test_a_random_schedule_of_stops_kills_and_numbers_sees_the_same_list(
    tmp_path, uninterrupted, small_dataset, seed
):
    chance = random.Random(seed)
    expected_run, expected = uninterrupted
    run = tmp_path / "run"
    seen, done, schedule = [], 0, []
    while done < STEPS:
        leg = {
            "size": chance.choice([1, 2, 3]),
            "first": done == 0 and not run.exists(),
            "last": done + chance.randint(3, 9),
            "killed": chance.random() < 0.5,
            "options": {
                **SMALL,
                **OPTIONS,
                "run": run,
                "shards": small_dataset,
                "micro_batch": chance.randint(1, 11),
                "parallel": chance.choice(["ddp", "fsdp"]),
            },
        }
        leg["signalled"] = chance.randrange(leg["size"])
        schedule.append({name: value for name, value in leg.items() if name != "options"})
        reports = run_ranks(LEG, **leg)
        done = (checkpoint.steps_of(run) or [0])[-1]
        seen = [one for one in seen + in_order(reports) if one[0] <= done]
        if leg["last"] < STEPS and not leg["killed"]:
            assert {each["outcome"].stopped_by for each in reports} == {Stop.SIGTERM}, schedule
            assert {each["outcome"].step for each in reports} == {done} == {leg["last"]}, schedule
    assert seen == expected, schedule
    assert_alike(run, expected_run, STEPS, rel=5e-5)
    shutil.rmtree(run)
