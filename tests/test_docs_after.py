"""What docs/after.md does with an export works: its Python runs as it stands, one block after the other."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_train import open_run
from minimind_train.weights.exporting import export
from tests.helpers.commands import TINY, mm_train

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "after.md").read_text(encoding="utf-8")
_, *ELSEWHERE = PAGE.partition("\n## Elsewhere\n")
PYTHON = re.findall(r"^```python\n(.*?)^```$", "".join(ELSEWHERE), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_code_for_an_export_runs_and_what_it_made_is_used_here(tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    former = torch.get_num_threads()
    tokenize([ROOT / "data" / "sample.jsonl"], TokenizeOptions(out=Path("data"), workers=1))
    made = mm_train("pretrain", "--shards", "data", "--run", "runs/sft", *TINY, "--steps", 1)
    assert made.exit_code == 0, made.stderr
    export(Path("runs/sft"), Path("export/sft"), to="hf")
    try:
        for code in PYTHON:
            names: dict = {}
            exec(compile(code, "docs/after.md", "exec"), names)  # noqa: S102 - the page's own code
    finally:
        torch.set_num_threads(former)
    assert names["trainer"].state.global_step == 2
    assert len(PYTHON) == 2
    answer = mm_train(
        "generate", "--run", "export/grpo", "--chat", "--prompt", "4 + 4?", "--max-new-tokens", 4
    )
    assert answer.exit_code == 0, answer.stderr


@pytest.mark.slow
def test_lm_evaluation_harness_scores_an_export_as_our_model_does(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="pip install 'minimind-pipeline[evaluate]'")
    monkeypatch.chdir(tmp_path)
    tokenize([ROOT / "data" / "sample.jsonl"], TokenizeOptions(out=Path("data"), workers=1))
    made = mm_train("pretrain", "--shards", "data", "--run", "runs/sft", *TINY, "--steps", 3)
    assert made.exit_code == 0, made.stderr
    export(Path("runs/sft"), Path("export/sft"), to="hf")
    Path("tasks").mkdir()
    for language, name in (("json", "sums.jsonl"), ("yaml", "sums.yaml")):
        (block,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
        Path("tasks", name).write_text(block, encoding="utf-8")
    (line,) = [line for line in PAGE.splitlines() if line.startswith("lm_eval ")]
    command = [sys.executable, "-m", *shlex.split(line), "--output_path", "scores"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    (scores,) = (json.loads(path.read_bytes()) for path in Path("scores").rglob("results_*.json"))

    trained = open_run("export/sft", device="cpu")
    tokenizer = trained.tokenizer.reference

    def log_probability(question, answer):
        start = len(tokenizer.encode(question, add_special_tokens=False).ids)
        ids = torch.tensor([tokenizer.encode(f"{question} {answer}", add_special_tokens=False).ids])
        with torch.no_grad():
            scores = trained.model.logits(trained.model(ids)).float().log_softmax(-1)[0, :-1]
        return scores.gather(-1, ids[0, 1:, None])[start - 1 :].sum().item()

    right = 0
    for each in map(json.loads, Path("tasks/sums.jsonl").read_text("utf-8").splitlines()):
        chances = [log_probability(each["question"], choice) for choice in each["choices"]]
        right += chances.index(max(chances)) == each["answer"]
    assert scores["results"]["sums"]["acc,none"] == right / 2
