"""Builds that go wrong: backends that lie, workers that die, kills at any moment; the dataset is the same in the end."""

import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest

from minimind_data.build import split as split_module
from minimind_data.build import workers as tries
from minimind_data.build.pipeline import tokenize
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.tokenizer import backends
from minimind_data.tokenizer.backends import ReferenceEncoder
from minimind_data.tokenizer.loading import load_tokenizer
from tests.helpers.builds import CRASHING, TEXTS, options, tree

REFERENCE = load_tokenizer().reference


@pytest.fixture
def source(write_jsonl):
    return write_jsonl(TEXTS)


class _LiesLater(ReferenceEncoder):
    """Passes every check at the start, and gives a wrong id in the middle of the input."""

    name = "fastokens"

    def encode_batch(self, texts):
        ids, offsets = super().encode_batch(texts)
        ids = ids.copy()
        for i, text in enumerate(texts):
            if text.startswith("第207个"):
                ids[offsets[i] + 1] ^= 1
        return ids, offsets


def test_a_difference_on_the_way_redoes_the_work_with_the_reference(tmp_path, source, monkeypatch):
    tokenize([source], options(tmp_path / "right"))
    monkeypatch.setitem(backends.FAST_BACKENDS, "fastokens", _LiesLater)
    monkeypatch.setattr(split_module, "_COMPARE_ONE_IN", 1)
    split_module._encoder.cache_clear()
    said = []
    reported = []
    summary = tokenize(
        [source],
        options(tmp_path / "a"),
        say=said.append,
        progress=lambda _, total: reported.append(total) or nullcontext(lambda b, _: reported.append(-b)),
    )
    split_module._encoder.cache_clear()
    assert tree(tmp_path / "a") == tree(tmp_path / "right")
    assert len(summary.differences) == 1
    assert "document " in summary.differences[0]
    assert any("differs from tokenizers" in one for one in said)


class _Panic(BaseException):
    """What a panic in Rust becomes in Python."""


class _Panics(ReferenceEncoder):
    """Passes every check at the start, and falls over in the middle of the input."""

    name = "fastokens"

    def encode_batch(self, texts):
        if len(texts) > 5 and any(text.startswith("第207个") for text in texts):
            raise _Panic("index out of bounds")
        return super().encode_batch(texts)


def test_a_backend_that_falls_over_on_the_way_is_replaced(tmp_path, source, monkeypatch):
    tokenize([source], options(tmp_path / "right"))
    monkeypatch.setitem(backends.FAST_BACKENDS, "fastokens", _Panics)
    split_module._encoder.cache_clear()
    said = []
    summary = tokenize([source], options(tmp_path / "out"), say=said.append)
    split_module._encoder.cache_clear()
    assert "it failed: _Panic: index out of bounds" in summary.differences[0]
    assert any("tokenizers does the work" in sentence for sentence in said)
    assert tree(tmp_path / "out") == tree(tmp_path / "right")


@pytest.mark.slow
def test_a_worker_that_dies_is_named_and_its_split_is_made_by_another(tmp_path, source):
    tokenize([source], options(tmp_path / "right"))
    said = []
    killed = []

    @contextmanager
    def kill_the_first_to_tell(_, total):
        def told(num_bytes, num_tokens):
            seen.append(num_bytes)
            if not killed:
                killed.append(multiprocessing.active_children()[0].pid)
                os.kill(killed[0], signal.SIGKILL)

        seen = []
        yield told
        assert sum(seen) == total

    tokenize(
        [source], options(tmp_path / "out", workers=12), say=said.append, progress=kill_the_first_to_tell
    )
    assert any(
        re.search(r"text.jsonl: the worker on bytes [\d,]+ to [\d,]+ died \(SIGKILL", one) for one in said
    )
    assert tree(tmp_path / "out") == tree(tmp_path / "right")


@pytest.mark.slow
def test_a_split_that_kills_its_workers_is_given_up_with_its_name(tmp_path, source, monkeypatch):
    monkeypatch.setattr(tries, "MAX_TRIES", 1)

    @contextmanager
    def kill(*_):
        yield lambda *_: [os.kill(child.pid, signal.SIGKILL) for child in multiprocessing.active_children()]

    with pytest.raises(UserError, match=r"text.jsonl: the worker on bytes .* died .*, 1 times; run the same"):
        tokenize([source], options(tmp_path / "out", workers=12), progress=kill)
    assert not (tmp_path / "out" / "manifest.json").exists()


def children_of(process_id):
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process_id)], capture_output=True, text=True, check=False
    )
    return [int(line) for line in found.stdout.split()]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps")
def test_workers_end_with_their_parent(tmp_path, write_jsonl):
    source = write_jsonl(TEXTS * 100)
    command = [sys.executable, "-m", "minimind_cli.data", "tokenize", source, "--out", tmp_path / "out"]
    command += ["--split-bytes", "512KiB", "--workers", "12", "--backend", "tokenizers"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while len(children := children_of(process.pid)) < 3 or not list((tmp_path / "out").glob("*.partial")):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}/stat").exists() and state_of(child) != "Z" for child in children):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.02)


def state_of(process_id):
    found = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(process_id)], capture_output=True, text=True, check=False
    )
    return found.stdout.strip()[:1] or "Z"


CRASHES = f"""{CRASHING}
source, out = paths
tokenize([source], TokenizeOptions(out=out, workers=1, split_bytes=2**14, backend="tokenizers"))
print(calls)
"""


@pytest.mark.slow
def test_death_between_any_two_system_calls_loses_nothing(tmp_path, write_jsonl):
    """The process ends, without any clean-up, before each of its renames, removals, flushes and folder changes in turn."""
    source = write_jsonl(TEXTS[:120])
    settings = {"split_bytes": 2**14, "backend": "tokenizers"}
    tokenize([source], options(tmp_path / "whole", **settings))
    wanted = tree(tmp_path / "whole")
    crash_at = 0
    while True:
        crash_at += 1
        out = tmp_path / f"out{crash_at}"
        run = subprocess.run(
            [sys.executable, "-c", CRASHES, source, out, str(crash_at)],
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode == 0:
            break
        assert run.returncode == 9, run.stderr
        if (out / "manifest.json").exists():
            assert ShardSet.open(out).rows(np.array([0]), 10).shape == (1, 10)
        tokenize([source], options(out, **settings))
        assert tree(out) == wanted, crash_at
    assert crash_at > 15
    assert int(run.stdout) == crash_at - 1


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(1, 2), (8, 1), (8, 12)])
def test_kill_9_at_random_moments(tmp_path, write_jsonl, workers):
    source = write_jsonl(TEXTS * 30)
    tokenize([source], options(tmp_path / "whole", split_bytes=2**15))
    out = tmp_path / "out"
    chance = random.Random(str(workers))
    kills = 0
    for _ in range(5):
        command = [
            sys.executable,
            "-m",
            "minimind_cli.data",
            "tokenize",
            source,
            "--out",
            out,
            "--split-bytes",
            "32KiB",
            "--workers",
            str(workers[kills % 2]),
        ]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        ) as process:
            while process.poll() is None and not (out / ".mm-build").exists():
                time.sleep(0.01)
            time.sleep(chance.uniform(0.05, 0.5))
            kills += process.poll() is None
            os.kill(process.pid, 9)
    assert kills >= 2
    summary = tokenize([source], options(out, split_bytes=2**15))
    assert not summary.already_done
    assert tree(out) == tree(tmp_path / "whole")


def test_a_backend_that_cannot_be_made_again_is_replaced(tmp_path, source, monkeypatch):
    tokenize([source], options(tmp_path / "right"))

    def fails(tokenizer, name):
        if name != "tokenizers":
            raise ValueError("unsupported")
        return backends.make_encoder(tokenizer, name)

    monkeypatch.setattr(split_module, "make_encoder", fails)
    split_module._encoder.cache_clear()
    summary = tokenize([source], options(tmp_path / "out"))
    split_module._encoder.cache_clear()
    assert "failed with this tokenizer (unsupported)" in summary.differences[0]
    assert tree(tmp_path / "out") == tree(tmp_path / "right")
