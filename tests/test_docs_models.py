"""Every command in docs/models.md runs as it stands, one after the other, and the page's figures are the program's."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from minimind_cli import train
from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.options import options_from
from minimind_train.model.config import ModelConfig, parameter_line
from minimind_train.model.presets import PRESETS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_commands_run(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    tokenize([ROOT / "data" / "sample.jsonl"], TokenizeOptions(out=tmp_path / "data" / "mine", workers=1))
    monkeypatch.chdir(tmp_path)
    former = torch.get_num_threads()
    small = ["--seq-len", "32", "--global-batch", "4", "--threads", "1", "--device", "cpu"]
    try:
        for language, code in BLOCKS:
            if language == "python":
                names: dict = {}
                exec(compile(code, "docs/models.md", "exec"), names)  # noqa: S102 - the page's own code
                assert type(names["model"]).__name__ == "Qwen3MoeForCausalLM"
                continue
            for line in code.splitlines():
                program, command, *words = shlex.split(line)
                assert program == "mm-train"
                arguments = [command, *words, *(small if command == "pretrain" else [])]
                result = CliRunner().invoke(train.app, arguments)
                assert result.exit_code == 0, (line, result.stderr)
    finally:
        torch.set_num_threads(former)
    assert len(BLOCKS) == 8


def test_the_sizes_are_those_of_the_presets():
    rows = dict(re.findall(r"^\| `([\w-]+)` \| ([\d.]+M(?:-A[\d.]+M)?) \|", PAGE, re.MULTILINE))
    counted = {name: parameter_line(options_from(ModelConfig, options)) for name, options in PRESETS.items()}
    assert {name: f"Model Params: {size}" for name, size in rows.items()} == counted
