"""What docs/after.md does with an export works: its Python runs as it stands, one block after the other."""

import re
from pathlib import Path

import pytest
import torch

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
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
