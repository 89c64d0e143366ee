"""JSON and TOML of 100,000 brackets, and bytes that are no text, in files that others wrote: each a sentence that names the file."""

import json
import shutil

import pytest

from minimind_train.run_folder.metrics import MetricsLog, read_metrics
from tests.helpers.commands import TINY, mm_data, mm_train
from tests.helpers.datasets import byte_tokenizer, text_dataset

BRACKETS = ["[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000]


@pytest.fixture
def tokenizer(tmp_path):
    """A folder with the tokenizer of `text_dataset`."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def refused(result, name):
    assert result.exit_code in (1, 2), result.output
    assert name in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("text", BRACKETS)
def test_tokenizer_config(tmp_path, tokenizer, text):
    (tokenizer / "tokenizer_config.json").write_text(text)
    inputs = tmp_path / "text.jsonl"
    inputs.write_text('{"text": "abc"}\n')
    arguments = [
        "tokenize",
        inputs,
        "--tokenizer",
        tokenizer,
        "--out",
        tmp_path / "out",
        "--workers",
        1,
    ]
    refused(mm_data(*arguments), "tokenizer_config.json")
    refused(mm_data(*arguments, "--kind", "sft"), "tokenizer_config.json")


@pytest.mark.parametrize("text", BRACKETS)
def test_tokenizer(tmp_path, tokenizer, text):
    (tokenizer / "tokenizer.json").write_text(text)
    inputs = tmp_path / "text.jsonl"
    inputs.write_text('{"text": "abc"}\n')
    refused(
        mm_data("tokenize", inputs, "--tokenizer", tokenizer, "--out", tmp_path / "out"),
        "tokenizer.json",
    )


@pytest.mark.parametrize("text", BRACKETS)
def test_records(tmp_path, tokenizer, text):
    (tmp_path / "text.jsonl").write_text(text + "\n")
    arguments = [
        tmp_path / "text.jsonl",
        "--tokenizer",
        tokenizer,
        "--out",
        tmp_path / "out",
        "--workers",
        1,
    ]
    refused(mm_data("tokenize", *arguments), "text.jsonl")


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = " + "[" * 100_000 + "]" * 100_000, "\udcff"])
def test_run_file(tmp_path, text):
    text_dataset(tmp_path / "data")
    (tmp_path / "run.toml").write_bytes(text.encode(errors="surrogateescape"))
    arguments = [
        "--shards",
        tmp_path / "data",
        "--run",
        tmp_path / "run",
        *TINY,
        "--config",
        tmp_path / "run.toml",
    ]
    refused(mm_train("pretrain", *arguments), "run.toml")


@pytest.mark.parametrize("text", BRACKETS)
def test_metrics(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    line = '{"step": 1, "loss": 2.0}\n'
    path.write_text(line + text + "\n")
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    with MetricsLog(path, last_step=1) as log:
        assert log.num_lines == 1
    assert path.read_text() == line


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
@pytest.mark.parametrize("text", BRACKETS)
def test_datasets_of_hugging_face(tmp_path, tokenizer, name, text):
    text_dataset(tmp_path / "data")
    assert mm_data("convert", tmp_path / "data", "--to", "hf", "--out", tmp_path / "hf").exit_code == 0
    folder = next(path.parent for path in (tmp_path / "hf").rglob(name))
    (folder / name).write_text(text)
    result = mm_data("convert", folder, "--tokenizer", tokenizer, "--out", tmp_path / "new")
    assert "Traceback" not in result.output
    assert name == "dataset_info.json" or "state.json" in result.output


def test_datasets_of_hugging_face_name_files_in_their_folder(tmp_path, tokenizer):
    text_dataset(tmp_path / "data")
    assert mm_data("convert", tmp_path / "data", "--to", "hf", "--out", tmp_path / "hf").exit_code == 0
    state = next((tmp_path / "hf").rglob("state.json"))
    name = next(state.parent.glob("*.arrow")).name
    shutil.copy(state.parent / name, tmp_path / "outside.arrow")
    state.write_text(state.read_text().replace(name, "../outside.arrow"))
    result = mm_data("convert", state.parent, "--tokenizer", tokenizer, "--out", tmp_path / "new")
    refused(result, "names '../outside.arrow', which is no file in this folder")


def test_metadata_of_datatrove_that_is_no_utf_8(tmp_path, tokenizer):
    text_dataset(tmp_path / "data")
    assert mm_data("convert", tmp_path / "data", "--to", "datatrove", "--out", tmp_path / "ds").exit_code == 0
    for path in (tmp_path / "ds").glob("*.metadata"):
        path.write_bytes(b"\xff\xfe\x00|9\n")
    result = mm_data("convert", tmp_path / "ds", "--tokenizer", tokenizer, "--out", tmp_path / "new")
    refused(result, "says 9 bytes a token")
