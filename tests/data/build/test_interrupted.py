"""Slices that are joined, standard input, and runs that are killed before any split is made: what is damaged says so."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from minimind_data.build.pipeline import commit, tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.dataset.verification import verify
from minimind_data.errors import UserError
from minimind_data.options import options_from
from tests.helpers.builds import tree


def options(out, **changes):
    return options_from(TokenizeOptions, {"out": out, "workers": 1, "split_bytes": 1024, **changes})


@pytest.fixture
def text(write_jsonl):
    return write_jsonl([f"text number {i % 90}" for i in range(100)])


@pytest.fixture
def begun(tmp_path, text):
    """All slices are made, and nothing is joined."""
    tokenize([text], options(tmp_path / "out", task=(1, 1)))
    return tmp_path / "out"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("plan.json", r"delete .*/out/\.mm-build and run the command that started this build again"),
        ("text-00001.result.json", "delete it and run the command that made this split again"),
    ],
)
@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"[]"),
        lambda path: path.write_bytes(b"{}"),
        lambda path: path.write_bytes(b"\xff\xfe"),
        lambda path: path.write_bytes(b"[" * 100_000),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_a_damaged_file_of_an_unfinished_build_is_named(begun, text, name, remedy, damage):
    damage(begun / ".mm-build" / name)
    complaint = rf"/out/\.mm-build/{name}: edited or damaged \(.*\); {remedy}"
    with pytest.raises(UserError, match=complaint):
        commit(begun)
    with pytest.raises(UserError, match=complaint):
        tokenize([text], options(begun))
    assert not (begun / "manifest.json").exists()


def test_what_the_sentence_says_helps(begun, text, tmp_path):
    tokenize([text], options(tmp_path / "whole"))
    flip(path := begun / ".mm-build" / "text-00001.result.json")
    path.unlink()
    with pytest.raises(UserError, match="1 of 3 splits are not made"):
        commit(begun)
    tokenize([text], options(begun, task=(1, 1)))
    commit(begun)
    assert tree(begun) == tree(tmp_path / "whole")


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"x")])
def test_a_lost_tokenizer_comes_back_with_a_slice(begun, text, damage):
    damage(begun / ".mm-build" / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json: missing or changed; run one of the slices again"):
        commit(begun)
    assert tokenize([text], options(begun, task=(1, 1))).made_shards == 0
    commit(begun)
    assert not verify(begun).problems


def test_commit_needs_a_build_and_its_inputs(begun, text, tmp_path):
    away = text.rename(text.with_name("away.jsonl"))
    with pytest.raises(
        UserError, match=rf"{text}: an input of this build, which is not there any more; put it back"
    ):
        commit(begun)
    away.rename(text)
    commit(begun)
    whole = tree(begun)
    with pytest.raises(UserError, match="out: a finished dataset already, so there are no slices to join"):
        commit(begun)
    assert tree(begun) == whole
    for nothing in (tmp_path / "nowhere", tmp_path, text):
        with pytest.raises(UserError, match="no unfinished build there"):
            commit(nothing)


class _Broken(io.RawIOBase):
    def read(self, size=-1):
        raise OSError(9, "Bad file descriptor")


class _Stdin:
    closed = False

    def __init__(self, buffer):
        self.buffer = buffer

    def isatty(self):
        return self.buffer is None


@pytest.mark.parametrize(
    ("stdin", "complaint"),
    [
        (None, "-: standard input is closed; pipe text into this command"),
        (_Stdin(None), "-: standard input is a terminal"),
        (_Stdin(_Broken()), r"-: standard input cannot be read \(Bad file descriptor\)"),
        (_Stdin(io.BytesIO()), "-: the file is empty"),
        (_Stdin(io.BytesIO(b"\0\1")), "-: its form cannot be told"),
    ],
)
def test_standard_input_that_gives_nothing(tmp_path, monkeypatch, stdin, complaint):
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(UserError, match=complaint):
        tokenize(["-"], options(tmp_path / "out"))
    assert tree(tmp_path / "out") == {}
    monkeypatch.setattr(sys, "stdin", _Stdin(io.BytesIO(b'{"text": "a"}\n')))
    tokenize(["-"], options(tmp_path / "out"))
    assert not verify(tmp_path / "out").problems


def test_standard_input_is_read_once(tmp_path):
    with pytest.raises(UserError, match="-: standard input can be read once, and by tokenize alone"):
        tokenize(["-", "-"], options(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_separator_is_for_text(tmp_path):
    with pytest.raises(ValueError, match="`separator` is for text, it does nothing with `format` jsonl"):
        options(tmp_path, format="jsonl", separator="x")


KILLED = """
import os, sys, time
from pathlib import Path
from minimind_data.build.plan import TokenizeOptions
from minimind_data.build.pipeline import tokenize
replace, hashed = Path.replace, []
def die(path, target):
    replace(path, target)
    hashed.extend([1] if str(target).endswith(".hashes") else [])
    if len(hashed) == 2:
        os.kill(os.getpid(), 9)
Path.replace = die
tokenize(sys.argv[2:], TokenizeOptions(out=Path(sys.argv[1]), workers=1, split_bytes=1024, dedup="exact"))
"""


def test_killed_while_duplicates_are_looked_for(tmp_path, text):
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out), str(text)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(out.glob(".mm-build/*.hashes"))
    made = tokenize([text], options(out, dedup="exact"))
    tokenize([text], options(tmp_path / "anew", dedup="exact"))
    assert made.manifest.duplicates == 10
    assert tree(out) == tree(tmp_path / "anew")


def test_killed_while_standard_input_is_read(tmp_path, text):
    out = tmp_path / "out"
    reader = subprocess.Popen([sys.executable, "-c", KILLED, str(out), "-"], stdin=subprocess.PIPE)
    data = text.read_bytes()
    reader.stdin.write(data[: len(data) // 2] + b" " * 2**21)  # a block at a time is read
    reader.stdin.flush()
    spooled = out / ".mm-build" / "stdin"
    while not (spooled.exists() and spooled.stat().st_size) and reader.poll() is None:
        time.sleep(0.01)
    reader.kill()
    assert reader.wait() == -signal.SIGKILL
    reader.stdin.close()
    assert spooled.stat().st_size
    command = [sys.executable, "-m", "minimind_cli.data", "tokenize", "-", "--out", str(out)]
    subprocess.run([*command, "--split-bytes", "1024"], input=data, check=True, capture_output=True)
    assert not verify(out).problems
    assert json.loads((out / "manifest.json").read_text())["inputs"][0]["bytes"] == len(data)
    assert not os.path.lexists(out / ".mm-build")
