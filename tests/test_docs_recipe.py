"""The recipe's commands run one after the other on small files of the same forms, and its figures are the program's."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from minimind_cli import data, train
from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.dataset.shard_set import ShardSet
from minimind_train.model.config import ModelConfig, parameter_line

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for code in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    for line in code.splitlines()
    if line.startswith("mm-")
]
FILES = {
    "pretrain": ("pretrain_t2t_mini.jsonl", "sample.jsonl"),
    "sft": ("sft_t2t_mini.jsonl", "sample_sft.jsonl"),
    "dpo": ("dpo.jsonl", "sample_dpo.jsonl"),
}
SMALL = "--hidden-size 16 --num-hidden-layers 1 --num-attention-heads 2 --num-key-value-heads 1"
SHORT = "--seq-len 64 --steps 2 --global-batch 2 --micro-batch 2 --threads 1 --device cpu --dtype fp32"


def test_the_commands_run_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dataset").mkdir()
    for name, sample in FILES.values():
        shutil.copy(ROOT / "data" / sample, Path("dataset", name))
    former = torch.get_num_threads()
    try:
        for line in COMMANDS:
            program, name, *words = shlex.split(line)
            if name in {"pretrain", "sft", "dpo"}:
                words += shlex.split(f"{SMALL} {SHORT}" if name == "pretrain" else SHORT)
            app = data.app if program == "mm-data" else train.app
            result = CliRunner().invoke(app, [name, *words], input="")
            assert result.exit_code == 0, (line, result.stderr)
    finally:
        torch.set_num_threads(former)
    assert len(COMMANDS) == 12
    assert Path("out", "dpo_16.pth").exists() or list(Path("out").glob("*.pth"))


@pytest.mark.parametrize("kind", FILES)
def test_the_sizes_follow_from_the_samples(kind, tmp_path):
    name, sample = FILES[kind]
    source = ROOT / "data" / sample
    tokenize([source], TokenizeOptions(out=tmp_path / "data", kind=kind, workers=1))
    num_tokens = ShardSet.open(tmp_path / "data").manifest.num_tokens
    bytes_per_token = source.stat().st_size / num_tokens
    size, unit, tokens, disk = re.search(
        rf"^\| `{re.escape(name)}` \| ([\d.]+) (GB|MB) \| ([\d.]+) billion \| ([\d.]+) GB \|",
        PAGE,
        re.MULTILINE,
    ).groups()
    expected = float(size) * (1 if unit == "GB" else 1e-3) / bytes_per_token
    assert float(tokens) == pytest.approx(expected, abs=0.005)
    assert float(disk) == pytest.approx(expected * (2 if kind == "pretrain" else 3), abs=0.02)
    assert f"{bytes_per_token:.2f}" in PAGE


def test_what_it_takes_is_what_the_model_takes():
    assert parameter_line(ModelConfig()) == "Model Params: 63.91M"
    assert "| parameters | 63.91M |" in PAGE
    weights = 63.91e6
    assert f"{16 * weights / 1e9:.2f} GB of the GPU" in PAGE
    assert f"{12 * weights / 1e9:.2f} GB on disk" in PAGE
    num_tokens = 1.2e9 / 3.15
    assert f"{6 * weights * 2 * num_tokens:.1e}".replace("e+", "e") in PAGE
    assert 2 * num_tokens / 340 / 256 == pytest.approx(8_800, rel=0.01)
