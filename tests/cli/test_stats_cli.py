"""mm-data stats as people and scripts see it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minimind_cli.data import app
from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions

SAMPLE = Path(__file__).parents[2] / "data" / "sample.jsonl"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stats") / "data"
    tokenize([SAMPLE], TokenizeOptions(out=folder, workers=1, tokenizer="default"))
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["stats", *map(str, arguments)])


def test_json_is_one_object_and_nothing_else(dataset, tmp_path):
    result = run(
        dataset, "--json", "--seq-len", 100, "--seq-len", 64, "--seq-len", 100, "--html", tmp_path / "p.html"
    )
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert [waste["seq_len"] for waste in told["layouts"]] == [100] * 3 + [64] * 3
    assert f"{tmp_path / 'p.html'}: " in result.stderr
    default = json.loads(run(dataset, "--json").stdout)
    assert [(waste["seq_len"], waste["layout"]) for waste in default["layouts"]] == [
        (seq_len, layout) for seq_len in (340, 512, 1024, 2048) for layout in ("concat", "pad", "pack")
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_terminal_shows_it_in_80_columns(dataset, encoding):
    command = [sys.executable, "-m", "minimind_cli.data", "stats", "data"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    told = subprocess.run(command, capture_output=True, check=True, env=environment, cwd=dataset.parent)
    lines = told.stdout.decode(encoding).splitlines()
    assert max(map(len, lines)) <= 80
    assert "  333 documents, 59,313 tokens in 1 shard" in lines
    assert any("2.10 characters a token, 3.16 bytes a token" in line for line in lines)
    assert any(("█" if encoding == "utf-8" else "####") in line for line in lines)
    assert not any("\\u" in line for line in lines)
    assert "     340  concat              174      0.0%         0.3%          51.4%" in lines


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (["nope"], 1, "nope: no dataset"),
        (["DATASET", "--seq-len", "1"], 1, "--seq-len 1: a window holds BOS and EOS at least"),
        (["DATASET", "--html", "nowhere/p.html"], 1, "nowhere/p.html: there is no folder nowhere"),
        (["DATASET", "--html", "."], 1, "is a folder"),
        (["DATASET", "--seq-len", "many"], 2, "--seq-len"),
        (["DATASET", "--windows", "0"], 2, "--windows"),
    ],
)
def test_what_cannot_be_done_is_said(dataset, arguments, status, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*(dataset if argument == "DATASET" else argument for argument in arguments))
    assert result.exit_code == status
    assert complaint in result.stderr
    assert not result.stdout
