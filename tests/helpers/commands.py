"""The commands: called in this process, or started in one of their own that can be killed."""

import subprocess
import sys
import time

from typer.testing import CliRunner

from minimind_cli import data, train

TINY = [
    *("--seq-len", "32", "--hidden-size", "16", "--num-hidden-layers", "1", "--num-attention-heads", "2"),
    *("--num-key-value-heads", "1", "--global-batch", "4", "--threads", "1", "--device", "cpu"),
]
"""The options of a model that trains in no time."""

STARTED = {
    "seq_len": 16, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "dropout": 0.1, "global_batch": 8, "micro_batch": 4, "steps": 60, "threads": 2, "save_every": 4, "keep": 2,
    "log_every": 1, "dtype": "auto", "device": "cpu",
}  # fmt: skip
"""Options, by name, of a run that takes long enough to be killed in the middle; `flags` makes arguments of them."""

MAIN = "from minimind_cli.train import main; main()"
"""mm-train as a program."""


def mm_data(*arguments, **options):
    """Call mm-data; `options` are those of `CliRunner.invoke`."""
    return CliRunner().invoke(data.app, list(map(str, arguments)), **options)


def mm_train(*arguments, **options):
    """Call mm-train; `options` are those of `CliRunner.invoke`."""
    arguments = list(map(str, arguments))
    return CliRunner().invoke(train.app, arguments, **options)


def flags(options):
    """The arguments that say these options."""
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def start(arguments, program=MAIN, command="pretrain"):
    """Start mm-train, or a program that ends in it."""
    return subprocess.Popen(
        [sys.executable, "-c", program, command, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def wait_for_step(process, run, step):
    """Wait until a run has written so many lines of metrics, or the process has ended."""
    deadline = time.monotonic() + 120
    path = run / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and step <= path.read_bytes().count(b"\n"):
            return
        time.sleep(0.001)
