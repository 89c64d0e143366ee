"""Under torchrun: two nodes on one machine are one run."""

import socket
import subprocess
import sys

import pytest

from minimind_data.options import options_from
from minimind_train.run import entry
from minimind_train.run.options import PretrainOptions
from tests.helpers.commands import MAIN, STARTED, flags
from tests.helpers.runs import Said, assert_alike

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_two_nodes_are_one_run(tmp_path, small_dataset):
    options = STARTED | {"steps": 10, "dropout": 0.0, "dtype": "fp32", "threads": 1, "parallel": "fsdp"}
    run, alone, program = tmp_path / "run", tmp_path / "alone", tmp_path / "mm_train.py"
    program.write_text(MAIN)
    port = free_port()
    nodes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node)),
                *("--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)),
                *("--", str(program), "pretrain", *flags({**options, "shards": small_dataset, "run": run})),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    said = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sum(each.count(f"{run}: done, 10 steps") for each in said) == 1
    assert sum(each.count("2 processes by fsdp") for each in said) == 1
    entry.begin(options_from(PretrainOptions, {**options, "shards": small_dataset, "run": alone}), Said())
    assert_alike(run, alone, 10)
