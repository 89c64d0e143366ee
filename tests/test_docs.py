"""The pages in docs/ do not lie: their Python runs as it stands, and does what the page says."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from minimind_cli import data
from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.tokenizer.places import SHIPPED, USUAL

ROOT = Path(__file__).parent.parent
LOOPS = (ROOT / "docs" / "loops.md").read_text(encoding="utf-8")
SECTIONS = {
    section.partition("\n")[0]: re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    for section in LOOPS.split("\n## ")[1:]
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder to run the page in: data/mine, and a tokenizer."""
    folder = tmp_path_factory.mktemp("page")
    tokenize([ROOT / "data" / "sample.jsonl"], TokenizeOptions(out=folder / "data" / "mine", workers=1))
    shutil.copytree(SHIPPED[USUAL], folder / "path" / "to" / "tokenizer")
    return folder


@pytest.fixture
def section(folder, monkeypatch):
    """Run the code of a section; return its names."""
    monkeypatch.chdir(folder)
    former = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(title):
        names: dict = {}
        for code in SECTIONS[title]:
            exec(compile(code, f"docs/loops.md, {title}", "exec"), names)  # noqa: S102 - the page's own code
        return names

    yield run
    torch.set_num_threads(former)


def rows(batches):
    return [row.tobytes() for batch in batches for row in batch["input_ids"].numpy()]


def in_order(names, windows, start, stop):
    fetched = windows.fetch(names["order"].windows(np.arange(start, stop)))
    return [row.tobytes() for row in fetched["input_ids"]]


def test_every_section_has_code():
    assert list(SECTIONS) == [
        "torch's DataLoader",
        "torchdata's StatefulDataLoader",
        "Hugging Face's Trainer",
        "MiniMind's own scripts",
    ]
    assert all(SECTIONS.values())


def test_torch(section):
    names = section("torch's DataLoader")
    n = len(names["windows"])
    assert names["batch"]["position_ids"].shape[1] == 128
    assert rows(names["rest"]) == in_order(names, names["windows"], 40, n)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
def test_torchdata(section):
    names = section("torchdata's StatefulDataLoader")
    windows = names["loader"].dataset.windows
    names["order"] = names["loader"].batch_sampler.order
    assert rows(names["before"] + names["rest"]) == in_order(names, windows, 0, len(windows))


def test_hugging_face(section):
    pytest.importorskip("transformers")
    names = section("Hugging Face's Trainer")
    assert names["trainer"].state.global_step == 4
    (place,) = [one.place for one in names["trainer"].callback_handler.callbacks if hasattr(one, "place")]
    assert place["position"] == 32


def test_minimind(section):
    pytest.importorskip("transformers")
    names = section("MiniMind's own scripts")
    assert names["input_ids"].shape == names["labels"].shape
    assert names["input_ids"].shape[1] == 340
    assert names["step"] == -(-len(names["train_ds"]) // 32)


def test_what_is_said_of_conversations(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "conversations.md").read_text(encoding="utf-8")
    (tmp_path / "data").mkdir()
    for kind in ("sft", "dpo"):
        shutil.copy(ROOT / "data" / f"sample_{kind}.jsonl", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    commands = [line.strip() for line in page.splitlines() if line.startswith("    mm-data")]
    assert len(commands) == 5
    for command in commands:
        told = CliRunner().invoke(data.app, shlex.split(command)[1:])
        assert told.exit_code == 0, (command, told.stderr)
    names: dict = {}
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, names)  # noqa: S102 - the page's own code
    assert {name: array.shape for name, array in names["batch"].items()} == dict.fromkeys(
        ("input_ids", "targets", "position_ids"), (4, 256)
    )
    sides = [f"{side}_{name}" for side in ("chosen", "rejected") for name in ("input_ids", "targets")]
    assert sorted(names["pair"]) == sorted(sides)
    assert names["prompt"] == (
        "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    told = CliRunner().invoke(data.app, ["tokenize", "--help"]).stdout
    for flag in re.findall(r"`(--[a-z-]+)", page):
        assert flag in told, flag
