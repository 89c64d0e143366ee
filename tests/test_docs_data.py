"""Every command in docs/datasets.md, formats.md and windows.md runs, one after the other, and does what the page says."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from minimind_cli import data, train
from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.dataset.format import Manifest
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.tokenizer.places import SHIPPED, USUAL

ROOT = Path(__file__).parent.parent
TEXTS = [json.loads(line)["text"] for line in (ROOT / "data" / "sample.jsonl").read_text().splitlines()]
SMALL = (
    "--hidden-size 16 --num-hidden-layers 1 --num-attention-heads 2 --num-key-value-heads 1 --seq-len 32 "
    "--global-batch 4 --threads 1 --device cpu"
)


def run_all(page):
    """Run the commands of a page; return what each said."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    said = {}
    for line in re.findall(r"^    (mm-.*)$", text, re.MULTILINE):
        command = re.split(r"\s+# ", line)[0]
        if "--engine ray" in command:  # wants a cluster; tests/data/test_ray.py has one
            continue
        program, name, *words = shlex.split(command)
        small = SMALL.split() if name == "pretrain" and "--resume" not in words else []
        result = CliRunner().invoke(data.app if program == "mm-data" else train.app, [name, *words, *small])
        assert result.exit_code == 0, (command, result.stderr)
        said[command] = result.output
    return said


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data" / "sample.jsonl", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dataset(name, texts=TEXTS, file="sample.jsonl"):
    Path(file).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenize([Path(file)], TokenizeOptions(out=Path("data", name), workers=1))


def test_from_text_to_a_dataset(folder):
    posts = [json.dumps({"data": {"content": text}}) for text in TEXTS[:20]]
    Path("posts.jsonl").write_text("\n".join(posts))
    Path("more_posts.jsonl").write_text("\n".join(posts[:5]))
    Path("broken.jsonl").write_text('{"data": {"content": 3}}\n{\n' + posts[0])
    Path("questions.jsonl").write_text('{"question": "why?", "answer": "so"}\n')
    Path("poems.txt").write_text("one\ntwo\n\nthree\n")
    run_all("datasets.md")
    made = {path.parent.name: Manifest.read(path.parent) for path in Path("data").glob("*/manifest.json")}
    counts = {"mine": 333, "posts": 21, "growing": 25, "questions": 1, "poems": 2, "sliced": 333, "own": 333}
    assert {name: made[name].num_documents for name in counts} == counts
    assert made["sliced"].fingerprint == made["mine"].fingerprint
    assert len(Path("data/posts/set-aside.jsonl").read_text().splitlines()) == 2
    held_out = Manifest.read(Path("data/parted/val")).num_documents
    assert 10 < held_out < 60
    assert made["parted"].num_documents + held_out == 333


def test_other_formats(folder):
    dataset("mine", [text.replace("<|im_end|>", "") for text in TEXTS])
    shutil.copytree(SHIPPED[USUAL], "path/to/tokenizer")
    samples = ROOT / "data" / "sample_sft.jsonl"
    tokenize([samples], TokenizeOptions(out=Path("data/sft"), kind="sft", workers=1))
    run_all("formats.md")
    mine, *others = (ShardSet.open(Path("data", name)) for name in ("mine", "old", "older", "oldest"))
    tokens = mine.slice(0, mine.num_tokens).tolist()
    for other in others:
        assert other.num_documents == mine.num_documents
        assert other.slice(0, other.num_tokens).tolist() == tokens
    assert Manifest.read(Path("data/mixed")).num_documents == 2 * mine.num_documents
    conversations = pq.read_table(next(Path("out/conversations").glob("*.parquet")))
    assert conversations.column_names == ["input_ids", "labels"]
    assert conversations.num_rows == len(samples.read_text().splitlines())


def test_windows_order_and_mixtures(folder):
    dataset("mine")
    dataset("zh", TEXTS[:200])
    dataset("en", TEXTS[200:])
    former = torch.get_num_threads()
    try:
        said = run_all("windows.md")
    finally:
        torch.set_num_threads(former)
    assert any("next sample-00000:" in text for text in said.values())
    assert any("positions 20 to 23 are left out" in text for text in said.values())
    assert any("zh=0.5" in text for text in said.values())
