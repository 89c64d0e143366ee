"""convert, merge and shuffle as scripts see them."""

import json

import pytest

from tests.helpers.commands import mm_data


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"Text number {i}."}) + "\n" for i in range(200)))
    result = mm_data("tokenize", path, "--out", tmp_path / "data", "--workers", 1, "--split-bytes", "2KiB")
    assert result.exit_code == 0, result.stderr
    return tmp_path / "data"


def good(result):
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_convert_there_and_back(dataset, tmp_path):
    there = good(mm_data("convert", dataset, "--to", "nanogpt", "--out", tmp_path / "n"))
    assert "200 documents" in there
    assert "in 1 file (shards to nanogpt)" in there
    back = good(
        mm_data(
            "convert", tmp_path / "n", "--from", "nanogpt", "--tokenizer", dataset, "--out", tmp_path / "back"
        )
    )
    assert "in 1 shard (nanogpt to shards)" in back
    assert "cut          at every id 2" in back
    assert "200 documents came without BOS, 0 without EOS; added" in back
    good(mm_data("verify", tmp_path / "back"))
    told = json.loads(good(mm_data("info", tmp_path / "back", "--json")))
    assert told["options"]["converted_from"] == "nanogpt"


def test_merge_and_shuffle_make_datasets(dataset, tmp_path):
    assert "400 documents" in good(mm_data("merge", dataset, dataset, "--out", tmp_path / "m"))
    made = good(
        mm_data("shuffle", tmp_path / "m", "--out", tmp_path / "s", "--seed", 7, "--shard-bytes", "1KiB")
    )
    assert "400 documents" in made
    good(mm_data("verify", tmp_path / "s"))
    good(mm_data("window", tmp_path / "s", 0, "--seq-len", 16))


@pytest.mark.parametrize(
    ("arguments", "status", "match"),
    [
        (["convert", "DATA"], 2, "--out"),
        (["convert", "DATA", "--out", "o"], 1, "say with --to what it should become"),
        (
            ["convert", "DATA", "--out", "o", "--to", "nanogtp"],
            1,
            "'nanogtp' is no format; known are shards,",
        ),
        (["convert", "nowhere", "--out", "o"], 1, "nowhere: no such file or folder"),
        (["convert", "DATA", "--out", "o", "--to", "hf", "--shard-bytes", "0"], 2, "at least 1"),
        (["merge", "DATA", "--out", "o"], 1, "at least two datasets"),
        (["shuffle", "DATA", "--out", "DATA"], 1, "not empty; take another --out"),
        (["shuffle", "DATA", "--out", "o", "--seed", "-1"], 2, "--seed must be from 0"),
    ],
)
def test_what_goes_wrong_is_one_sentence(dataset, tmp_path, monkeypatch, arguments, status, match):
    monkeypatch.chdir(tmp_path)
    result = mm_data(*(dataset if argument == "DATA" else argument for argument in arguments))
    assert result.exit_code == status
    assert match in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "o").exists()
