"""Each error on the pages of questions is one that the program prints, word for word."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from minimind_cli import data, train
from minimind_data.errors import UserError
from minimind_train.parallel.devices import user_error_on_out_of_memory

ROOT = Path(__file__).parent.parent
ERRORS = re.findall(
    r"^    (error: .*)$", (ROOT / "docs" / "faq.md").read_text(encoding="utf-8"), re.MULTILINE
)
TINY = (
    "--hidden-size 16 --num-hidden-layers 1 --num-attention-heads 2 --num-key-value-heads 1 --seq-len 64 "
    "--steps 2 --global-batch 4 --threads 1 --device cpu --dtype fp32"
)
PROVOKED_BY = {
    1: "mm-data tokenize gbk.jsonl --out data/gbk",
    2: "mm-data tokenize conversations.jsonl --out data/talk",
    3: "mm-data tokenize torn.jsonl --out data/torn",
    4: "mm-train pretrain --shards sample.jsonl --run runs/none",
    5: f"mm-train pretrain --shards data/mine --run runs/first {TINY}",
    6: "mm-train pretrain --run runs/first --resume --learning-rate 0.01",
    7: "mm-train sft --shards data/other --from-weight runs/first --run runs/sft --device cpu",
    8: "mm-train pretrain --shards data/mine --run runs/device --device cuda",
    9: f"mm-train pretrain --shards data/mine --run runs/nan {TINY} --learning-rate 1e30 --grad-clip 0",
}


def standard_error(line):
    """Run a command; return its last line on standard error and its exit status."""
    program, *words = line.split()
    result = CliRunner().invoke(data.app if program == "mm-data" else train.app, words)
    return (result.stderr.strip().splitlines() or [""])[-1], result.exit_code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a dataset, a run, and what is wrong with the inputs of the errors."""
    folder = tmp_path_factory.mktemp("faq")
    text = (ROOT / "data" / "sample.jsonl").read_text(encoding="utf-8")
    (folder / "sample.jsonl").write_text(text, encoding="utf-8")
    (folder / "gbk.jsonl").write_bytes(text.encode("gb18030"))
    (folder / "torn.jsonl").write_text(text[:200], encoding="utf-8")
    conversations = (ROOT / "data" / "sample_sft.jsonl").read_text(encoding="utf-8").splitlines()
    only = [json.dumps({"conversations": json.loads(line)["conversations"]}) for line in conversations]
    (folder / "conversations.jsonl").write_text("\n".join(only), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        former = torch.get_num_threads()
        for line in (
            "mm-data tokenize sample.jsonl --out data/mine --workers 1",
            "mm-data tokenize conversations.jsonl --kind sft --out data/other --tokenizer minimind2 --workers 1",
            f"mm-train pretrain --shards data/mine --run runs/first {TINY}",
        ):
            last, status = standard_error(line)
            assert status == 0, last
        yield folder
        torch.set_num_threads(former)


def pattern(error):
    return ".*".join(map(re.escape, error.split("…")))


@pytest.mark.parametrize("number", PROVOKED_BY)
def test_an_error_on_the_page_is_printed(folder, monkeypatch, number):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    last, status = standard_error(PROVOKED_BY[number])
    assert status == 1
    assert re.fullmatch(pattern(ERRORS[number - 1]), last), last


def test_the_error_of_memory_that_runs_out():
    with (
        pytest.raises(UserError) as caught,
        user_error_on_out_of_memory("take a smaller batch"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert re.fullmatch(pattern(ERRORS[9]), f"error: {caught.value}")


def test_there_are_ten():
    assert len(ERRORS) == len(PROVOKED_BY) + 1 == 10


def test_the_command_for_gbk_makes_it_readable(folder):
    text = subprocess.run(
        ["iconv", "-f", "GB18030", "-t", "UTF-8", "gbk.jsonl"], check=True, capture_output=True, cwd=folder
    ).stdout
    assert text == (folder / "sample.jsonl").read_bytes()
