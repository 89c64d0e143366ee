"""Every command in docs/tuning.md runs one after the other, on a model that is small enough for a test."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from minimind_cli import data, train

ROOT = Path(__file__).parent.parent
COMMANDS = re.findall(
    r"^    (mm-.*)$", (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8"), re.MULTILINE
)
SMALL = {
    "pretrain": "--hidden-size 16 --num-hidden-layers 1 --num-attention-heads 2 --num-key-value-heads 1 --seq-len 32",
    "sft": "--seq-len 96",
    "dpo": "--seq-len 64",
}
QUICK = "--steps 1 --global-batch 4 --micro-batch 4 --threads 1 --device cpu"


@pytest.mark.slow
def test_the_commands_run(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for sample in (ROOT / "data").glob("sample*.jsonl"):
        (tmp_path / "data" / sample.name).symlink_to(sample)
    monkeypatch.chdir(tmp_path)
    former = torch.get_num_threads()
    try:
        for line in COMMANDS:
            program, command, *words = shlex.split(line)
            if command in SMALL:
                words += [*SMALL[command].split(), *QUICK.split()]
            if command == "generate":
                words += ["--max-new-tokens", "4"]
            arguments = [command, *words]
            app = data.app if program == "mm-data" else train.app
            result = CliRunner().invoke(app, arguments, input="Hello?\n" if "--chat" in words else None)
            assert result.exit_code == 0, (line, result.output)
    finally:
        torch.set_num_threads(former)
    assert len(COMMANDS) == 11
    assert (tmp_path / "out" / "adapters" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "lora_lora_16.pth").is_file()
