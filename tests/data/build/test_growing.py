"""A dataset that grows and changes: only what changed is made, and the result is that of a build from nothing."""

import json
import subprocess
import sys

import numpy as np
import pytest

from minimind_data.build import pipeline
from minimind_data.build.dedup import duplicates, hashes_of, in_validation
from minimind_data.build.pipeline import commit, tokenize
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.dataset.verification import verify
from minimind_data.errors import UserError
from minimind_data.tokenizer.loading import load_tokenizer
from tests.helpers.builds import CRASHING, options, tree

REFERENCE = load_tokenizer().reference
TEXTS = [
    f"第{i}个问题：{i} 加 {i} 等于多少？ What is {i} times two? It is {2 * i}." + " filler" * (i % 40)
    for i in range(300)
]


def stamps(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.bin")}


def texts_of(folder):
    tokenizer = load_tokenizer(folder)
    shards = ShardSet.open(folder)
    return [
        tokenizer.decode(shard.tokens[offset // 2 + 1 : offset // 2 + length - 1].tolist())
        for shard in shards
        for offset, length in zip(shard.offsets, shard.lengths, strict=True)
    ]


@pytest.fixture
def a(write_jsonl):
    return write_jsonl(TEXTS[:150], "a.jsonl")


@pytest.fixture
def b(write_jsonl):
    return write_jsonl(TEXTS[150:], "b.jsonl")


def test_another_file_makes_only_its_shards(tmp_path, a, b):
    out = tmp_path / "out"
    first = tokenize([a], options(out))
    before = stamps(out)
    said = []
    grown = tokenize([a, b], options(out), say=said.append)
    assert (grown.kept_shards, grown.already_done) == (first.made_shards, False)
    assert any("splits are done already" in sentence for sentence in said)
    assert {name: stamp for name, stamp in stamps(out).items() if name in before} == before
    tokenize([a, b], options(tmp_path / "anew"))
    assert tree(out) == tree(tmp_path / "anew")
    assert tokenize([a, b], options(out)).already_done


def test_a_changed_file_remakes_only_the_splits_that_changed(tmp_path, a, b):
    out = tmp_path / "out"
    made = tokenize([a, b], options(out)).made_shards
    before = stamps(out)
    data = a.read_bytes()
    a.write_bytes(data.replace(b"filler", b"FILLER", 1))  # as long as before, in the first split
    said = []
    changed = tokenize([a, b], options(out), say=said.append)
    assert (changed.made_shards, changed.kept_shards) == (1, made - 1)
    assert any("a.jsonl: changed since a-00000 was made" in sentence for sentence in said)
    after = stamps(out)
    assert [name for name in before if before[name] != after[name]] == ["a-00000.bin"]
    tokenize([a, b], options(tmp_path / "anew"))
    assert tree(out) == tree(tmp_path / "anew")
    a.write_bytes(data[:3000].rsplit(b"\n", 1)[0] + b"\n")  # shorter: its later shards go
    tokenize([a, b], options(out))
    tokenize([a, b], options(tmp_path / "short"))
    assert tree(out) == tree(tmp_path / "short")


def test_a_removed_file_is_noticed(tmp_path, a, b):
    out = tmp_path / "out"
    tokenize([a, b], options(out))
    whole = tree(out)
    with pytest.raises(
        UserError,
        match=r"out: holds documents of a.jsonl, which is not among the inputs now; .*`on_removed_input` drop",
    ):
        tokenize([b], options(out))
    assert tree(out) == whole
    dropped = tokenize([b], options(out, on_removed_input="drop"))
    assert dropped.made_shards == 0
    tokenize([b], options(tmp_path / "anew"))
    assert tree(out) == tree(tmp_path / "anew")


def test_another_order_keeps_the_shards(tmp_path, a, b):
    out = tmp_path / "out"
    tokenize([a, b], options(out))
    assert tokenize([b, a], options(out)).made_shards == 0
    tokenize([b, a], options(tmp_path / "anew"))
    assert tree(out) == tree(tmp_path / "anew")


def test_a_renamed_file_is_not_a_removed_one(tmp_path, a):
    tokenize([a], options(tmp_path / "out"))
    other = a.rename(a.with_name("other.jsonl"))
    tokenize([other], options(tmp_path / "out"))
    tokenize([other], options(tmp_path / "anew"))
    assert tree(tmp_path / "out") == tree(tmp_path / "anew")


def test_bad_records_of_shards_that_stay_are_kept(tmp_path, a, b):
    for path, at in ((a, 3), (b, 70)):
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:at], b"bad line\n", *lines[at:], b"another\n"]))
    settings = {"on_bad_record": "set-aside"}
    tokenize([a], options(tmp_path / "out", **settings))
    tokenize([b, a], options(tmp_path / "out", **settings))
    tokenize([b, a], options(tmp_path / "anew", **settings))
    assert tree(tmp_path / "out") == tree(tmp_path / "anew")
    told = [json.loads(line) for line in (tmp_path / "out" / "set-aside.jsonl").read_text().splitlines()]
    assert [(record["path"][-7:], record["line"]) for record in told] == [
        ("b.jsonl", 71), ("b.jsonl", 152), ("a.jsonl", 4), ("a.jsonl", 152),
    ]  # fmt: skip
    a.write_bytes(a.read_bytes().replace(b"another\n", b"").replace(b"bad line\n", b""))
    b.write_bytes(b.read_bytes().replace(b"another\n", b"").replace(b"bad line\n", b""))
    tokenize([b, a], options(tmp_path / "out", **settings))
    assert not (tmp_path / "out" / "set-aside.jsonl").exists()


def test_the_same_text_is_always_on_the_same_side(tmp_path, a, b, write_jsonl):
    shuffled = write_jsonl(TEXTS[::-1], "c.jsonl")
    one = tokenize([a, b], options(tmp_path / "one", val_fraction=0.2))
    two = tokenize([shuffled], options(tmp_path / "two", val_fraction=0.2, split_bytes=2**20))
    assert sorted(texts_of(tmp_path / "one" / "val")) == sorted(texts_of(tmp_path / "two" / "val"))
    assert sorted(texts_of(tmp_path / "one")) == sorted(texts_of(tmp_path / "two"))
    assert one.validation.num_documents == two.validation.num_documents
    assert 30 < one.validation.num_documents < 90
    assert sorted(texts_of(tmp_path / "one") + texts_of(tmp_path / "one" / "val")) == sorted(TEXTS)
    assert not verify(tmp_path / "one" / "val").problems
    assert ShardSet.open(tmp_path / "one" / "val").manifest.fingerprint != one.manifest.fingerprint
    assert tokenize([a, b], options(tmp_path / "one", val_fraction=0.2)).already_done


def test_a_validation_part_grows_with_its_dataset(tmp_path, a, b):
    settings = {"val_fraction": 0.1, "dedup": "exact"}
    tokenize([a], options(tmp_path / "out", **settings))
    tokenize([a, b], options(tmp_path / "out", **settings))
    tokenize([a, b], options(tmp_path / "anew", **settings))
    assert tree(tmp_path / "out") == tree(tmp_path / "anew")
    (tmp_path / "out" / "val" / "a-00000.bin").unlink()
    assert tokenize([a, b], options(tmp_path / "out", **settings)).made_shards == 1
    assert tree(tmp_path / "out") == tree(tmp_path / "anew")


def test_the_share_of_the_validation_part_is_what_was_asked_for():
    texts = [f"text {i}" for i in range(100_000)]
    assert abs(in_validation(texts, 0.01).mean() - 0.01) < 0.001
    assert not in_validation(texts, 0.0).any()
    assert (
        in_validation(texts, 0.01) <= in_validation(texts, 0.02)
    ).all()  # a larger share holds the smaller


@pytest.mark.parametrize("workers", [1, 12])
def test_duplicates_keep_their_first(tmp_path, write_jsonl, workers):
    doubled = [text for i, text in enumerate(TEXTS) for _ in range(1 + i % 3)]
    a, b = write_jsonl(doubled[:300], "a.jsonl"), write_jsonl(doubled[200:] + TEXTS[:5], "b.jsonl")
    summary = tokenize([a, b], options(tmp_path / "out", dedup="exact", workers=workers))
    assert texts_of(tmp_path / "out") == TEXTS
    assert summary.manifest.duplicates == 300 + len(doubled[200:]) + 5 - len(TEXTS)
    assert tokenize([a, b], options(tmp_path / "out", dedup="exact")).already_done
    assert not (tmp_path / "out" / ".mm-build").exists()


def test_a_duplicate_that_loses_its_first_comes_back(tmp_path, write_jsonl):
    a, b = write_jsonl(TEXTS[:20], "a.jsonl"), write_jsonl(TEXTS[10:40], "b.jsonl")
    tokenize([a, b], options(tmp_path / "out", dedup="exact"))
    write_jsonl(TEXTS[:15], "a.jsonl")
    tokenize([a, b], options(tmp_path / "out", dedup="exact"))
    tokenize([a, b], options(tmp_path / "anew", dedup="exact"))
    assert tree(tmp_path / "out") == tree(tmp_path / "anew")
    assert texts_of(tmp_path / "out") == TEXTS[:40]


def test_duplicates_are_found_across_splits():
    splits = [["a", "b", "a"], [], ["c", "b"], ["a", "d", "d", "e"]]
    assert [found.tolist() for found in duplicates([hashes_of(texts) for texts in splits])] == [
        [2],
        [],
        [1],
        [0, 2],
    ]
    assert duplicates([]) == []


def test_slices_join_to_the_same_dataset(tmp_path, a, b):
    out = tmp_path / "out"
    settings = {"dedup": "exact", "val_fraction": 0.1}
    tokenize([a, b], options(tmp_path / "whole", **settings))
    for number in (3, 1):
        summary = tokenize([a, b], options(out, task=(number, 3), **settings))
        assert summary.manifest is None
        assert summary.made_shards > 0
    with pytest.raises(
        UserError, match=r"out: \d+ of \d+ splits are not made \(a-00001, …\); run the slices"
    ):
        commit(out)
    tokenize([a, b], options(out, task=(2, 3), **settings))
    assert tokenize([a, b], options(out, task=(2, 3), **settings)).made_shards == 0
    assert not (out / "manifest.json").exists()
    commit(out)
    assert tree(out) == tree(tmp_path / "whole")
    with pytest.raises(UserError, match="a finished dataset already"):
        commit(out)


def test_slices_run_side_by_side_and_nothing_else_does(tmp_path, a):
    out = tmp_path / "out"

    def while_slicing(sentence):
        if sentence.startswith("encoding with"):
            tokenize([a], options(out, task=(2, 2)))
            for settings in ({}, {"task": (1, 2)}):
                with pytest.raises(UserError, match="another run is writing there"):
                    tokenize([a], options(out, **settings))
            with pytest.raises(UserError, match="another run is writing there"):
                commit(out)

    tokenize([a], options(out, task=(1, 2)), say=while_slicing)
    commit(out)
    tokenize([a], options(tmp_path / "whole"))
    assert tree(out) == tree(tmp_path / "whole")


def test_a_slice_with_other_options_is_refused_before_any_split_is_made(tmp_path, a, monkeypatch):
    out = tmp_path / "out"
    refusals = []

    def while_slicing(sentence):
        if sentence.startswith("encoding with"):
            assert not list((out / ".mm-build").glob("*.result.json"))
            plan = (out / ".mm-build" / "plan.json").read_bytes()
            for name, value in (("eos_token", "<|im_start|>"), ("max_word_chars", 1000), ("dedup", "exact")):
                other = options(out, task=(2, 2), **{name: value})
                with pytest.raises(UserError, match=f"an unfinished build with other options: `{name}`"):
                    tokenize([a], other)
                # One that begins at the same moment learns of it when it comes to the plan.
                with monkeypatch.context() as patch:
                    patch.setattr(pipeline, "Precedent", Late(pipeline.Precedent))
                    with pytest.raises(UserError, match="with other options"):
                        tokenize([a], other)
                refusals.append(name)
                assert (out / ".mm-build" / "plan.json").read_bytes() == plan

    tokenize([a], options(out, task=(1, 2)), say=while_slicing)
    assert len(refusals) == 3
    tokenize([a], options(out, task=(2, 2)))
    commit(out)
    tokenize([a], options(tmp_path / "whole"))
    assert tree(out) == tree(tmp_path / "whole")


class Late:
    """A precedent that is not there yet when it is looked for the first two times."""

    def __init__(self, precedent):
        self.looks, self._precedent = 0, precedent

    def of(self, *arguments):
        self.looks += 1
        return None if self.looks < 3 else self._precedent.of(*arguments)


def test_a_slice_that_made_nothing_binds_nobody(tmp_path, a):
    out = tmp_path / "out"

    class Stopped(BaseException):
        pass

    def stop(sentence):
        if sentence.startswith("encoding with"):
            raise Stopped

    with pytest.raises(Stopped):
        tokenize([a], options(out, task=(1, 2)), say=stop)
    assert (out / ".mm-build" / "plan.json").exists()
    for number in (1, 2):
        tokenize([a], options(out, task=(number, 2), eos_token="<|im_start|>"))
    commit(out)
    tokenize([a], options(tmp_path / "whole", eos_token="<|im_start|>"))
    assert tree(out) == tree(tmp_path / "whole")


def test_standard_input_reads_as_a_file(tmp_path, a):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "minimind_cli.data",
        "tokenize",
        "-",
        "--out",
        out,
        "--split-bytes",
        "8KiB",
    ]
    for words in ("300 documents", "already done"):
        with a.open("rb") as file:
            run = subprocess.run(command, stdin=file, capture_output=True, text=True, check=False)
        assert (run.returncode, "150 documents" in run.stdout or words in run.stdout) == (0, True), run.stderr
    tokenize([a], options(tmp_path / "whole"))
    here, there = ShardSet.open(out), ShardSet.open(tmp_path / "whole")
    assert np.array_equal(here.slice(0, here.num_tokens), there.slice(0, there.num_tokens))
    assert [entry.path for entry in here.manifest.inputs] == ["-"]
    assert [entry.name for entry in here.manifest.shards][:1] == ["stdin-00000"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        _, told = process.communicate("")
    assert process.returncode == 1
    assert "-: the file is empty" in told


CRASHES = f"""{CRASHING}
a, b, out = paths
tokenize([a, b], TokenizeOptions(out=out, workers=1, split_bytes=2**14, backend="tokenizers", val_fraction=0.1,
                                 on_bad_record="set-aside"))
print(calls)
"""


@pytest.mark.slow
def test_death_between_any_two_system_calls_of_a_change_loses_nothing(tmp_path, write_jsonl):
    """One input changed, one is new; the process ends before each of its renames, removals and flushes in turn."""
    a, b = write_jsonl(TEXTS[:100], "a.jsonl"), write_jsonl(TEXTS[150:180], "b.jsonl")
    with a.open("a") as file:
        file.write("bad\n")
    settings = {
        "split_bytes": 2**14,
        "backend": "tokenizers",
        "val_fraction": 0.1,
        "on_bad_record": "set-aside",
    }
    first = tmp_path / "first"
    tokenize([a], options(first, **settings))
    a.write_bytes(a.read_bytes().replace(b"filler", b"FILLER", 1))
    tokenize([a, b], options(tmp_path / "whole", **settings))
    wanted = tree(tmp_path / "whole")
    crash_at = 0
    while True:
        crash_at += 1
        out = tmp_path / f"out{crash_at}"
        subprocess.run(["cp", "-r", first, out], check=True)
        run = subprocess.run(
            [sys.executable, "-c", CRASHES, a, b, out, str(crash_at)],
            capture_output=True,
            text=True,
            check=False,
        )
        if (out / "manifest.json").exists():
            assert not verify(out).problems, crash_at
        if run.returncode == 0:
            break
        assert run.returncode == 9, run.stderr
        tokenize([a, b], options(out, **settings))
        assert tree(out) == wanted, crash_at
    assert crash_at > 30
    assert int(run.stdout) == crash_at - 1
