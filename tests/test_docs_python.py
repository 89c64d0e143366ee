"""docs/python.md does not lie: its code runs from top to bottom as it stands, and does what the page says."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from minimind_train.parallel.interrupt import Stop
from minimind_train.run_folder.checkpoint import steps_of
from tests.helpers.runs import steps

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
SECTIONS = {
    section.partition("\n")[0]: re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    for section in PAGE.split("\n## ")[1:]
}


@pytest.fixture
def run_section(tmp_path, monkeypatch):
    """Run the code of a section after that of the sections before it; return the names of all."""
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data" / "sample.jsonl", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    names: dict = {}

    def run(title):
        (code,) = SECTIONS[title]
        exec(compile(code, f"docs/python.md, {title}", "exec"), names)  # noqa: S102 - the page's own code
        return names

    yield run
    torch.set_num_threads(former)


def test_the_page_runs(run_section, capsys):
    titles = iter(SECTIONS)
    names = run_section(next(titles))
    assert {name: array.shape for name, array in names["sample"].items()} == {
        "input_ids": (128,),
        "targets": (128,),
    }
    assert names["text"].startswith("<|im_start|>")

    names = run_section(next(titles))
    assert list(names["losses"]) == [1, 2, 3, 4, 5]
    assert (names["outcome"].step, names["outcome"].stopped_by) == (5, Stop.CALLER)

    names = run_section(next(titles))
    assert list(names["losses"]) == list(range(1, 21))
    assert (names["outcome"].step, names["outcome"].stopped_by) == (20, None)
    assert steps_of(Path("runs/first"))[-1] == 20
    assert steps(Path("runs/first"))[-1] == 20

    names = run_section(next(titles))
    assert isinstance(names["answer"], str)
    assert [message["role"] for message in names["chat"].messages] == ["user", "assistant"]
    assert names["chat"].messages[1]["content"] == names["reply"]
    assert names["place"].keys() == {"epoch", "window", "shard", "offset"}
    assert names["read"]
    assert names["loss"] == pytest.approx(names["losses"][20], abs=1)
    assert Path("out/hf/model.safetensors").is_file()

    capsys.readouterr()
    run_section(next(titles))
    assert capsys.readouterr().out.startswith("runs/second: no run there (no such folder); correct the name")
    assert not list(titles)
