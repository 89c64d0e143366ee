"""mm-data with conversations and pairs, as people and scripts see it."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minimind_cli.data import app

SAMPLES = Path(__file__).parents[2] / "data"
IGNORED = -100


def run(*arguments, status=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.stderr
    return result


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    for kind in ("sft", "dpo"):
        made = run("tokenize", SAMPLES / f"sample_{kind}.jsonl", "--kind", kind, "--out", root / kind)
        assert f"{root / kind}: {84 if kind == 'sft' else 30} documents" in made.stdout
    return root


def test_the_samples_hold_nothing_that_is_in_doubt(datasets):
    for kind in ("sft", "dpo"):
        told = json.loads(run("info", datasets / kind, "--json").stdout)
        assert (told["kind"], told["set_aside"], told["different_prompts"], told["unlearned"]) == (
            kind,
            0,
            0,
            0,
        )
        assert told["chat_template"]
        assert "whole" in run("verify", datasets / kind).stdout
    assert "0 of the pairs have different prompts" in run("info", datasets / "dpo").stdout


def test_the_readme_of_the_samples_tells_the_truth():
    readme = (SAMPLES / "README.md").read_text("utf-8")
    for kind in ("sft", "dpo"):
        data = (SAMPLES / f"sample_{kind}.jsonl").read_bytes()
        told = f"{len(data.splitlines())} lines, {len(data):,} bytes, {len(data.decode()):,} characters"
        assert told in " ".join(readme.split())


@pytest.mark.parametrize("labels", [False, True])
def test_window_of_a_conversation(datasets, labels):
    flags = ["--labels"] if labels else []
    told = json.loads(run("window", datasets / "sft", 0, "--seq-len", 64, "--json", *flags).stdout)
    name = "labels" if labels else "targets"
    assert set(told) == {"input_ids", name, "document_ids", "shard", "offset", "text"}
    assert told["text"].startswith("<|im_start|>user\n你好！<|im_end|>\n<|im_start|>assistant\n你好！很高兴")
    learned = [target for target in told[name] if target != IGNORED]
    assert 0 < len(learned) < 64
    assert (told[name][-1], told["document_ids"][-1]) == (IGNORED, -1)
    shown = run("window", datasets / "sft", 0, "--seq-len", 64, *flags).stdout
    assert f"{len(learned)} of 64 positions learned" in shown
    assert "\x1b" not in shown


def test_window_of_a_pair(datasets):
    told = json.loads(run("window", datasets / "dpo", 3, "--seq-len", 96, "--json").stdout)
    sides = [f"{side}_{name}" for side in ("chosen", "rejected") for name in ("input_ids", "targets")]
    assert set(told) == {*sides, "document_ids", "shard", "offset", "text"}
    assert all(len(told[name]) == 96 for name in sides)
    assert told["text"]["chosen"] != told["text"]["rejected"]
    assert "of 192 positions learned" in run("window", datasets / "dpo", 3, "--seq-len", 96).stdout
    refused = run("window", datasets / "dpo", 3, "--seq-len", 96, "--layout", "pack", status=1)
    assert "take --layout pad, not pack" in refused.stderr


@pytest.mark.parametrize(("kind", "plain"), [("sft", False), ("dpo", False), ("sft", True)])
def test_on_a_terminal_what_is_learned_is_in_colour_unless_nobody_wants_it(datasets, kind, plain):
    command = "from minimind_cli.data import main; main()"
    arguments = ["window", str(datasets / kind), "0", "--seq-len", "96"]
    environment = {**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    environment.pop("NO_COLOR", None)
    if plain:
        environment["NO_COLOR"] = "1"
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", command, *arguments], stdout=theirs, stderr=subprocess.PIPE, env=environment
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            block = os.read(ours, 4096)
        except OSError:  # so a terminal says that it is closed
            break
        if not block:
            break
        shown += block
    os.close(ours)
    assert process.wait() == 0, process.stderr.read()
    process.stderr.close()
    text = shown.decode().replace("\r\n", "\n")
    if plain:
        assert "\x1b" not in text
        return
    assert text.count(" PAD\x1b[0m") == (1 if kind == "sft" else 2)
    if kind == "sft":
        assert "assistant\n\x1b[0m\x1b[32m你好！很高兴和你聊天。有什么想问的吗？<|im_end|>\n\x1b[0m" in text


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_stats_and_the_page_tell_what_is_learned(datasets, kind, tmp_path):
    told = json.loads(run("stats", datasets / kind, "--seq-len", 64, "--json").stdout)
    assert told["kind"] == kind
    assert 0 < told["learned_tokens"] < told["tokens"]
    layouts = {waste["layout"]: waste["windows"] for waste in told["layouts"]}
    assert layouts["pad"] == told["documents"]
    assert set(layouts) == ({"pad"} if kind == "dpo" else {"concat", "pad", "pack"})
    run("stats", datasets / kind, "--seq-len", 64, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    views = {view["layout"]: view for view in data["views"]}
    assert set(views) == ({"chosen", "rejected"} if kind == "dpo" else {"concat", "pad", "pack"})
    side = "chosen" if kind == "dpo" else "pad"
    window = views[side]["windows"][0]
    name = "chosen_targets" if kind == "dpo" else "targets"
    shown = json.loads(run("window", datasets / kind, 0, "--seq-len", 64, "--json").stdout)
    unlearned = {place for start, stop in window["unlearned"] for place in range(start, stop)}
    assert [place for place in range(1, 64) if place not in unlearned] == [
        place + 1 for place in range(63) if shown[name][place] != IGNORED
    ]
    assert ".learned" in page
    assert page.count("--learned:") == 2  # in light, and in dark


def test_pairs_in_doubt_are_said(tmp_path):
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    pair = {"chosen": [question, answer], "rejected": [{**question, "content": "p"}, answer]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    shown = run("tokenize", tmp_path / "pairs.jsonl", "--kind", "dpo", "--out", tmp_path / "out").stdout
    assert "1 pair with different prompts" in shown


@pytest.mark.parametrize(
    ("flags", "status", "reason"),
    [
        (["--kind", "sft", "--field", "text2"], 2, "fields of its own"),
        (["--kind", "chat"], 2, "chat"),
        (["--empty-think-ratio", "3", "--kind", "sft"], 2, "is no share"),
        (["--chat-date", "today", "--kind", "sft"], 2, "is no date"),
        (["--allow-special-in-content"], 2, "do nothing with kind pretrain"),
        (["--kind", "sft", "--chat-template", "gone.jinja"], 1, "gone.jinja: no such file"),
        (["--kind", "dpo"], 1, "sample_sft.jsonl:1: no field 'chosen'"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(tmp_path, flags, status, reason):
    source = SAMPLES / "sample_sft.jsonl"
    result = run("tokenize", source, "--out", tmp_path / "out", *flags, status=status)
    assert reason in " ".join(result.stderr.replace("│", " ").split())
