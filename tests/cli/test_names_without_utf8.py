"""Names of files that are no UTF-8 are shown, and refused in a sentence where a manifest would have to hold them."""

import os

import pytest

from minimind_data.inputs.discovery import stem_of
from minimind_data.inputs.sources import Source
from tests.helpers.commands import mm_data

REFUSAL = "the name is no UTF-8, so a manifest cannot hold it; rename the file"
NAME = os.fsdecode(b"n\xff")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (NAME, "mixed", "left"):
        (tmp_path / folder).mkdir()
    for path in (
        "good.jsonl",
        f"{NAME}.jsonl",
        f"{NAME}/a.jsonl",
        f"mixed/{NAME}.jsonl",
        "left/a.jsonl",
        f"left/{NAME}.x",
    ):
        (tmp_path / path).write_text('{"text": "a text"}\n')


def said(*arguments):
    result = mm_data(*arguments)
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


@pytest.mark.parametrize("source", [f"{NAME}.jsonl", NAME, "mixed", "*.jsonl"])
def test_an_input_is_refused(source):
    for command in ("tokenize", "train-tokenizer"):
        result = said(command, source, "--out", "out")
        assert result.exit_code == 1
        assert REFUSAL in result.stderr
        assert "n\\udcff" in result.stderr


def test_what_no_manifest_holds_may_have_any_name():
    left = said("tokenize", "left", "--out", "left-out")
    assert left.exit_code == 0
    assert "n\\udcff.x" in left.stderr
    out = f"{NAME}.data"
    assert said("tokenize", "good.jsonl", "--out", out).exit_code == 0
    for command in (["info", out], ["verify", out], ["stats", out, "--html", f"{NAME}.html"]):
        assert said(*command).exit_code == 0
    with open(f"{NAME}.html", encoding="utf-8") as page:  # noqa: PTH123 - by its name
        assert "n\\udcff.data" in page.read()
    refused = said("tokenize", "good.jsonl", "--out", out, "--field", "other")
    assert "n\\udcff.data: holds a dataset that was made differently" in refused.stderr
    shuffled = said("shuffle", out, "--out", "shuffled")
    assert shuffled.exit_code == 1
    assert REFUSAL in shuffled.stderr


def test_shards_of_such_a_file_have_a_name_all_the_same():
    assert stem_of(Source(name=f"{NAME}.jsonl", location="", form="jsonl")) == "n?"
