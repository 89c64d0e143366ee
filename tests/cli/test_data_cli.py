"""mm-data as scripts see it: exit statuses, one sentence on stderr, JSON alone on stdout."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minimind_data.dataset import writer
from minimind_data.options import format_size, parse_size
from minimind_data.tokenizer.places import SHIPPED
from tests.helpers.commands import mm_data

TEXTS = [f"Question {i}? Answer {i}。<|im_end|>" for i in range(200)]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def dataset(source, tmp_path):
    result = mm_data("tokenize", source, "--out", tmp_path / "data", "--workers", 1, "--split-bytes", "2KiB")
    assert result.exit_code == 0, result.stderr
    return tmp_path / "data"


def sentence(result, status=1):
    """Return the one line of an error, after checking that it is one and that nothing else was said."""
    assert result.exit_code == status, (result.exit_code, result.stderr)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    return lines[0]


def test_tokenize_says_what_it_made_and_that_it_is_done(source, tmp_path):
    first = mm_data("tokenize", source, "--out", tmp_path / "data", "--workers", 1)
    assert first.exit_code == 0
    assert "200 documents" in first.stdout
    assert "encoding with fastokens: agrees with tokenizers" in first.stderr
    second = mm_data("tokenize", source, "--out", tmp_path / "data")
    assert second.exit_code == 0
    assert "already done, nothing to do" in second.stdout


def test_info(dataset, source):
    told = json.loads(mm_data("info", dataset, "--json").stdout)
    assert (told["documents"], told["kind"], told["dtype"]) == (200, "pretrain", "uint16")
    assert told["inputs"][0]["path"] == str(source)
    assert "200 documents" in mm_data("info", dataset).stdout


def test_info_names_the_tokenizer_as_far_as_it_is_known(dataset, tmp_path):
    special = "6,400 entries, BOS <|im_start|> (1), EOS <|im_end|> (2), PAD <|endoftext|> (0), "
    own = f"  tokenizer    minimind3, byte-level BPE, {special}"
    assert own in mm_data("info", dataset).stdout
    assert json.loads(mm_data("info", dataset, "--json").stdout)["tokenizer_name"] is not None
    other = dataset.with_name("other")
    (tmp_path / "changed").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "changed" / name).write_text(
            (SHIPPED["default"] / name).read_text("utf-8") + "\n", "utf-8"
        )
    (tmp_path / "few.jsonl").write_text('{"text": "a text"}\n')
    made = mm_data("tokenize", tmp_path / "few.jsonl", "--out", other, "--tokenizer", tmp_path / "changed")
    assert made.exit_code == 0
    lines = mm_data("info", other).stdout.splitlines()
    line = next(line for line in lines if line.startswith("  tokenizer"))
    assert line.startswith(f"  tokenizer    byte-level BPE, {special}")
    assert line.endswith("… (it is not recorded where it came from)")
    assert json.loads(mm_data("info", other, "--json").stdout)["tokenizer_name"] is None


def test_window_speaks_json_and_text(dataset):
    told = json.loads(mm_data("window", dataset, 3, "--seq-len", 16, "--json").stdout)
    assert set(told) == {"input_ids", "targets", "document_ids", "shard", "offset", "text"}
    assert told["input_ids"][1:] == told["targets"][:-1]
    assert told["offset"] == 48
    labels = json.loads(
        mm_data("window", dataset, 3, "--seq-len", 64, "--layout", "pad", "--labels", "--json").stdout
    )
    assert set(labels) == {"input_ids", "labels", "document_ids", "shard", "offset", "text"}
    assert labels["text"].startswith("<|im_start|>Question 3?")
    assert "window 3 of" in mm_data("window", dataset, 3, "--seq-len", 16).stdout
    assert "there are windows 0 to" in sentence(mm_data("window", dataset, 10**6, "--seq-len", 16))


def test_packed_windows_are_planned_once_and_leave_the_dataset_as_it_is(dataset):
    before = sorted(path.name for path in dataset.iterdir())
    arguments = ("--seq-len", 64, "--layout", "pack", "--long-documents", "fragment")
    first = mm_data("window", dataset, 3, *arguments, "--json")
    assert "planning which of 200 documents share a window of 65 tokens" in first.stderr
    told = json.loads(first.stdout)
    assert len(set(told["document_ids"]) - {-1}) > 1
    again = mm_data("window", dataset, 3, *arguments)
    assert "planning" not in again.stderr
    assert "% of all positions filled" in again.stderr
    assert "0 tokens of the dataset in no window" in again.stdout
    located = json.loads(
        mm_data("locate", dataset, *arguments, "--position", 3, "--order", "sequential", "--json").stdout
    )
    assert (located["window"], located["shard"], located["offset"]) == (3, told["shard"], told["offset"])
    assert mm_data("verify", dataset).exit_code == 0
    assert sorted({path.name for path in dataset.iterdir()} - {".mm-pack"}) == before
    assert "'cut', 'fragment', 'drop'" in mm_data(
        "window", dataset, 3, "--seq-len", 64, "--long-documents", "lose"
    ).stderr.replace("\n", " ")


def test_locate_agrees_with_window(dataset):
    told = json.loads(mm_data("locate", dataset, "--seq-len", 16, "--position", 10**9, "--json").stdout)
    assert set(told) == {"position", "epoch", "window", "shard", "offset"}
    window = json.loads(mm_data("window", dataset, told["window"], "--seq-len", 16, "--json").stdout)
    assert (window["shard"], window["offset"]) == (told["shard"], told["offset"])
    straight = json.loads(
        mm_data("locate", dataset, "--seq-len", 16, "--position", 5, "--order", "sequential", "--json").stdout
    )
    assert (straight["epoch"], straight["window"]) == (0, 5)
    assert "position 5: epoch 0" in mm_data("locate", dataset, "--seq-len", 16, "--position", 5).stdout


def test_locate_speaks_mixtures(dataset):
    words = ["locate", f"b={dataset}:0.25", f"a={dataset}:3/4", "--seq-len", 16]
    told = [json.loads(mm_data(*words, "--position", position, "--json").stdout) for position in range(8)]
    assert [one.pop("part") for one in told].count("a") == 6
    assert set(told[0]) == {"position", "epoch", "window", "shard", "offset"}
    window = json.loads(mm_data("window", dataset, told[5]["window"], "--seq-len", 16, "--json").stdout)
    assert (window["shard"], window["offset"]) == (told[5]["shard"], told[5]["offset"])
    assert (
        "part a, epoch"
        in mm_data(*words, "--position", 10**9).stdout + mm_data(*words, "--position", 10**9 + 1).stdout
    )
    wrong = mm_data("locate", f"a={dataset}:x", "--seq-len", 16, "--position", 1)
    assert wrong.exit_code == 2
    assert "such as 0.7 or 1/3" in " ".join(wrong.stderr.split())


def test_verify_finds_every_flipped_byte(dataset):
    assert mm_data("verify", dataset).exit_code == 0
    assert json.loads(mm_data("verify", dataset, "--json").stdout)["ok"] is True
    for path in sorted(dataset.iterdir()):
        good = path.read_bytes()
        for at in range(0, len(good), max(1, len(good) // 5)):
            bad = bytearray(good)
            bad[at] ^= 1
            path.write_bytes(bad)
            assert path.name in sentence(mm_data("verify", dataset)), (path, at)
        path.write_bytes(good)
    assert mm_data("verify", dataset).exit_code == 0


def test_verify_as_json_tells_the_problems_and_fails(dataset):
    (dataset / "text-00001.bin").unlink()
    result = mm_data("verify", dataset, "--json")
    told = json.loads(result.stdout)
    assert told["ok"] is False
    assert "text-00001.bin: missing" in told["problems"][0]
    sentence(result)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["tokenize", "nope.jsonl"], "nope.jsonl: no such file"),
        (["tokenize", "SOURCE", "--tokenizer", "nope"], "nope: no such file"),
        (["info", "nope"], "nope: no dataset"),
        (["verify", "nope"], "nope: no dataset"),
        (["window", "nope", "0", "--seq-len", "8"], "nope: no dataset"),
        (["locate", "nope", "--seq-len", "8", "--position", "0"], "nope: no dataset"),
        (
            ["locate", "DATASET", "--seq-len", "8", "--position", "-1"],
            "--position counts samples, from 0 to 2^63 - 1, not -1",
        ),
        (["locate", "DATASET", "--seq-len", "8", "--position", "10" + 27 * "0"], "--position counts samples"),
        (["locate", "DATASET", "--seq-len", "8", "--position", "1", "--seed", "-1"], "--seed must be from 0"),
        (
            ["locate", "DATASET", "--seq-len", "8", "--position", "1", "--seed", str(2**64)],
            "--seed must be from 0",
        ),
        (["window", "DATASET", "0", "--seq-len", "0"], "--seq-len must be at least 1"),
        (["window", "DATASET", "0", "--seq-len", 12 * "9", "--layout", "pad"], "--seq-len must be at most"),
        (["train-tokenizer", "SOURCE", "--out", "x.json", "--vocab-size", 12 * "9"], "serve no model"),
        (["tokenize", "SOURCE", "--out", "new", "--field", "te'xt"], 'no field "te\'xt"'),
        (["train-tokenizer", "SOURCE", "--out", "x.json", "--vocab-size", "5"], "--vocab-size 5"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(source, dataset, arguments, complaint, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    places = {"SOURCE": source, "DATASET": dataset}
    assert complaint in sentence(mm_data(*(places.get(argument, argument) for argument in arguments)))


@pytest.mark.parametrize(
    "arguments",
    [
        ["tokenize"],
        ["tokenize", "x", "--split-bytes", "many"],
        ["tokenize", "x", "--split-bytes", "5"],
        ["tokenize", "x", "--workers", "-1"],
        ["tokenize", "x", "--backend", "magic"],
        ["tokenize", "x", "--wrokers", "1"],
        ["window", "x", "zero", "--seq-len", "8"],
        ["nonsense"],
    ],
)
def test_wrong_usage_is_status_2(arguments):
    result = mm_data(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


def test_a_full_disk_is_named_and_the_run_can_go_on(source, tmp_path, monkeypatch):
    real = writer.ShardWriter.append
    calls = []

    def full(self, tokens, lengths, mask=None):
        calls.append(1)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, tokens, lengths, mask)

    arguments = ["tokenize", source, "--out", tmp_path / "data", "--workers", 1, "--split-bytes", "2KiB"]
    monkeypatch.setattr(writer.ShardWriter, "append", full)
    assert "data: the disk is full; everything that was finished is kept" in sentence(mm_data(*arguments))
    assert not list((tmp_path / "data").rglob("*.partial"))
    monkeypatch.undo()
    result = mm_data(*arguments)
    assert result.exit_code == 0
    assert "kept       3 shards" in result.stdout


@pytest.mark.parametrize("stderr", [subprocess.PIPE, subprocess.STDOUT])
def test_a_reader_that_goes_away_does_not_stop_the_work(source, tmp_path, stderr):
    command = [sys.executable, "-m", "minimind_cli.data", "tokenize", source, "--out", tmp_path / "data"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr) as process:
        process.stdout.close()
        if process.stderr:
            process.stderr.close()
        assert process.wait(timeout=60) == 0
    assert (tmp_path / "data" / "manifest.json").exists()


def test_a_read_only_dataset_that_is_done_is_done(source, dataset, monkeypatch):
    real = Path.mkdir

    def read_only(self, *arguments, **settings):
        if self.name == ".mm-build":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        real(self, *arguments, **settings)

    monkeypatch.setattr(Path, "mkdir", read_only)
    command = ["tokenize", source, "--out", dataset, "--split-bytes", "2KiB"]
    result = mm_data(*command)
    assert result.exit_code == 0
    assert "already done, nothing to do" in result.stdout
    (dataset / "text-00001.idx").unlink()
    assert "data: cannot be written (Read-only file system)" in sentence(mm_data(*command))


def test_verify_says_each_remedy_once_and_it_helps(source, dataset):
    for name in ("text-00000", "text-00001"):
        (dataset / f"{name}.bin").write_bytes(b"")
        (dataset / f"{name}.idx").write_bytes((dataset / f"{name}.idx").read_bytes()[:50])
    (dataset / "tokenizer.json").write_bytes(b"{}")
    (dataset / "manifest.json").write_bytes((dataset / "manifest.json").read_bytes() + b" ")
    told = sentence(mm_data("verify", dataset))
    assert (
        told.count("delete the shard's")
        == told.count("run the same `mm-data tokenize` again: it restores the file")
        == 1
    )
    again = mm_data("tokenize", source, "--out", dataset, "--split-bytes", "2KiB")
    assert again.exit_code == 0, again.stderr
    assert "4 of 6 splits are done already; making 2" in again.stderr
    assert "tokenizer.json: was missing or changed, and is restored" in again.stderr
    assert mm_data("verify", dataset).exit_code == 0


def test_train_tokenizer_makes_one_that_tokenize_takes(source, tmp_path):
    result = mm_data(
        "train-tokenizer", source, "--out", tmp_path / "tok" / "tokenizer.json", "--vocab-size", 300
    )
    assert "300 entries" in result.stdout
    assert not result.stderr
    made = mm_data("tokenize", source, "--out", tmp_path / "data", "--tokenizer", tmp_path / "tok")
    assert made.exit_code == 0


def test_train_tokenizer_says_what_it_leaves_out(source, tmp_path):
    folder = tmp_path / "clone"
    folder.mkdir()
    shutil.copy(source, folder / "train.jsonl")
    shutil.copy(source, folder / "test.jsonl")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    result = mm_data("train-tokenizer", folder, "--out", tmp_path / "tok", "--vocab-size", 300)
    assert result.exit_code == 0
    assert "left out as the split test: test.jsonl" in result.stderr


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(tmp_path):
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 200))
    command = [sys.executable, "-m", "minimind_cli.data", "tokenize", source, "--out", tmp_path / "data"]
    command += ["--split-bytes", "16KiB", "--backend", "tokenizers", "--workers", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob("data/.mm-build/*.result.json")):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; finished shards are kept, run the same command again for the rest" in told
    assert "Traceback" not in told
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "kept" in again.stdout


@pytest.mark.parametrize(
    ("text", "size"), [("64MiB", 2**26), ("1.5GB", 15 * 10**8), ("4096", 4096), (" 2 kib ", 2048), ("7b", 7)]
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "1XiB", "-", "nan", "inf", "1e400"])
def test_no_sizes_are_refused(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 2**20, 3 * 2**30])
def test_sizes_are_written_as_they_are_read(size):
    assert parse_size(format_size(size)) == size
