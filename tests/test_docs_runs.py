"""Every command in docs/runs.md runs, one after the other, and does what the page says."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from minimind_cli import train
from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_train.run_folder import checkpoint

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]
SMALL = [
    *("--seq-len", "32", "--global-batch", "4", "--hidden-size", "16", "--num-hidden-layers", "1"),
    *(
        "--num-attention-heads",
        "2",
        "--num-key-value-heads",
        "1",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--dtype",
        "fp32",
    ),
    *("--val-batches", "2"),
]


@pytest.mark.slow
def test_the_commands_run(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    tokenize([ROOT / "data" / "sample.jsonl"], TokenizeOptions(out=tmp_path / "data" / "mine", workers=1))
    monkeypatch.chdir(tmp_path)
    former = torch.get_num_threads()
    try:
        for line in COMMANDS:
            program, command, *words = shlex.split(line)
            assert program == "mm-train"
            small = SMALL if command == "pretrain" and "--config" not in words else []
            result = CliRunner().invoke(train.app, [command, *words, *small])
            assert result.exit_code == 0, (line, result.stderr)
            assert "--track" not in result.stderr
    finally:
        torch.set_num_threads(former)
    assert {4, 6, 8} <= set(checkpoint.steps_of(Path("runs/first")))
    name = f"{checkpoint.CHECKPOINTS_NAME}/step-000000008/{checkpoint.MODEL_NAME}"
    first, again, second = (Path("runs", run, name).read_bytes() for run in ("first", "again", "second"))
    assert first == again != second
    assert list(Path("runs/second/tracking/tensorboard").iterdir())
    assert Path("runs.html").is_file()
