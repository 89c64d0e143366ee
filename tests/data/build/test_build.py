"""The build: same bytes whatever happened on the way, nothing half-written looks whole, nothing bad goes unsaid."""

import json
import resource
from pathlib import Path

import numpy as np
import orjson
import pytest

from minimind_data.build.pipeline import tokenize
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.dataset.verification import verify
from minimind_data.dataset.writer import ShardWriter
from minimind_data.errors import UserError
from minimind_data.files import remove_partials
from minimind_data.tokenizer.loading import load_tokenizer
from minimind_data.tokenizer.places import SHIPPED
from tests.helpers.builds import TEXTS, options, tree

REFERENCE = load_tokenizer().reference


def documents(folder: Path) -> list[list[int]]:
    return [
        shard.tokens[offset // 2 : offset // 2 + length].tolist()
        for shard in ShardSet.open(folder)
        for offset, length in zip(shard.offsets, shard.lengths, strict=True)
    ]


@pytest.fixture
def source(write_jsonl):
    return write_jsonl(TEXTS)


def test_documents_are_bos_ids_eos_in_order(source, tmp_path):
    summary = tokenize([source], options(tmp_path / "out"))
    wanted = [[1, *REFERENCE.encode(text, add_special_tokens=False).ids, 2] for text in TEXTS]
    assert documents(tmp_path / "out") == wanted
    assert summary.manifest.num_documents == len(TEXTS)
    assert summary.manifest.num_tokens == sum(map(len, wanted))
    assert summary.made_shards == len(summary.manifest.shards) > 5
    assert summary.compared >= len(summary.manifest.shards)
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == sorted(
        [".bin", ".idx"] * summary.made_shards + [".json"] * 3
    )


@pytest.mark.parametrize(
    "changes",
    [{"workers": 2}, {"workers": 12}, {"backend": "tokenizers"}, {"workers": 8, "backend": "tokenizers"}],
)
def test_the_bytes_depend_on_the_input_alone(source, tmp_path, changes):
    tokenize([source], options(tmp_path / "a"))
    tokenize([source], options(tmp_path / "b", **changes))
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_another_cut_into_shards_is_the_same_dataset(source, tmp_path):
    one = tokenize([source], options(tmp_path / "a")).manifest
    two = tokenize([source], options(tmp_path / "b", split_bytes=2**20)).manifest
    assert len(two.shards) == 1
    assert one.fingerprint == two.fingerprint
    assert documents(tmp_path / "a") == documents(tmp_path / "b")


def test_the_source_of_a_shard_is_recorded(source, tmp_path):
    manifest = tokenize([source], options(tmp_path / "a")).manifest
    data = source.read_bytes()
    parts = [data[entry.origin.input_start : entry.origin.input_stop] for entry in manifest.shards]
    assert b"".join(parts) == data
    assert [part.count(b"\n") for part in parts] == [entry.written.documents for entry in manifest.shards]


def test_a_second_run_does_nothing(source, tmp_path):
    tokenize([source], options(tmp_path / "a"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    assert tokenize([source], options(tmp_path / "a", workers=2)).already_done
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()} == before


def test_a_lost_shard_is_made_again(source, tmp_path):
    tokenize([source], options(tmp_path / "a"))
    before = tree(tmp_path / "a")
    (tmp_path / "a" / "text-00001.bin").unlink()
    (tmp_path / "a" / "tokenizer.json").unlink()
    summary = tokenize([source], options(tmp_path / "a"))
    assert (summary.made_shards, summary.already_done) == (1, False)
    assert tree(tmp_path / "a") == before


def test_other_settings_are_refused_and_shown(source, tmp_path, write_jsonl):
    tokenize([source], options(tmp_path / "a"))
    before = tree(tmp_path / "a")
    other = write_jsonl([*TEXTS, "one more"], "other.jsonl")
    for inputs, changes, difference in [
        (
            [source],
            {"split_bytes": 9000},
            "made differently: `split_bytes` is 8KiB there and 9000 here; to add to it",
        ),
        (
            [source],
            {"bos_token": "<|im_end|>"},
            r"`bos_token` is '<\|im_start\|>' there and '<\|im_end\|>' here",
        ),
        ([other], {}, "holds documents of text.jsonl, which is not among the inputs now; name all inputs"),
    ]:
        with pytest.raises(UserError, match=difference):
            tokenize(inputs, options(tmp_path / "a", **changes))
    assert tree(tmp_path / "a") == before


def test_two_runs_at_once_are_refused(source, tmp_path):
    out = tmp_path / "a"
    told = []

    def nested(_):
        with pytest.raises(UserError, match="another run is writing there"):
            tokenize([source], options(out))
        told.append("refused")

    tokenize([source], options(out), say=nested)
    assert told
    assert tokenize([source], options(out)).already_done


def test_several_inputs_keep_their_order_and_names(tmp_path, write_jsonl):
    (tmp_path / "sub").mkdir()
    inputs = [write_jsonl(["a"], "b.jsonl"), write_jsonl(["b"], "a.jsonl"), write_jsonl(["c"], "sub/b.jsonl")]
    manifest = tokenize(inputs, options(tmp_path / "out")).manifest
    assert [entry.name for entry in manifest.shards] == ["b-00000", "a-00000", "b~2-00000"]
    assert [entry.origin.input for entry in manifest.shards] == [0, 1, 2]
    assert [REFERENCE.decode(document) for document in documents(tmp_path / "out")] == ["a", "b", "c"]


def test_empty_texts_are_counted_and_make_no_document(tmp_path, write_jsonl):
    source = write_jsonl(["", "a", "", "b", ""])
    manifest = tokenize([source], options(tmp_path / "out")).manifest
    assert (manifest.num_documents, manifest.empty_texts) == (2, 3)


def test_a_split_without_documents_makes_no_shard(tmp_path, write_jsonl):
    source = write_jsonl(["a", "", "x " * 3000, "b"])
    manifest = tokenize([source], options(tmp_path / "out", split_bytes=1024)).manifest
    assert [entry.name for entry in manifest.shards] == ["text-00000", "text-00005"]
    assert manifest.empty_texts == 1
    assert tokenize([source], options(tmp_path / "out", split_bytes=1024)).already_done


@pytest.mark.parametrize("texts", [[""], ["", ""]])
def test_nothing_to_tokenize(tmp_path, write_jsonl, texts):
    with pytest.raises(UserError, match="no record has any text"):
        tokenize([write_jsonl(texts)], options(tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("workers", [1, 8])
def test_a_bad_record_stops_with_its_line_and_leaves_no_dataset(source, tmp_path, workers):
    with source.open("ab") as file:
        file.write(b'{"text": 5}\n')
    with pytest.raises(
        UserError,
        match=rf"text\.jsonl:{len(TEXTS) + 1}: field 'text' is a number, .*`on_bad_record` set-aside",
    ):
        tokenize([source], options(tmp_path / "out", workers=workers))
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(UserError, match="no dataset"):
        ShardSet.open(tmp_path / "out")


def test_bad_records_set_aside_can_be_had_back(tmp_path):
    bad = {3: b'{"text": 5}', 120: b"not json", 121: b'{"text": "\xff"}'}
    lines = [
        bad.get(number, b'{"text": "line %d, with some words behind it"}' % number)
        for number in range(1, 301)
    ]
    source = tmp_path / "x.jsonl"
    source.write_bytes(b"\n".join(lines) + b"\n")
    for workers in (1, 8):
        out = tmp_path / f"out{workers}"
        summary = tokenize(
            [source], options(out, split_bytes=2000, on_bad_record="set-aside", workers=workers)
        )
        assert (summary.manifest.set_aside, summary.manifest.num_documents) == (3, 297)
        told = [orjson.loads(line) for line in (out / "set-aside.jsonl").read_bytes().splitlines()]
        assert [(one["path"], one["line"]) for one in told] == [(str(source), line) for line in bad]
        assert [one.get("data") for one in told] == ['{"text": 5}', "not json", None]
        assert told[2]["data_base64"]
        assert told[0]["reason"] == (
            "field 'text' is a number, not a string; name the field of the text with --field"
        )  # as it always stood there
    assert tree(tmp_path / "out1") == tree(tmp_path / "out8")


def test_after_a_stop_the_rest_can_be_had_by_mending_or_setting_aside(tmp_path, source):
    good = source.read_bytes()
    source.write_bytes(good + b"oops\n")
    for out in ("mended", "aside"):
        with pytest.raises(UserError, match="not JSON"):
            tokenize([source], options(tmp_path / out))
    aside = tokenize([source], options(tmp_path / "aside", on_bad_record="set-aside"))
    source.write_bytes(good)
    mended = tokenize([source], options(tmp_path / "mended"))
    assert aside.kept_shards > 3
    assert mended.kept_shards > 3
    tokenize([source], options(tmp_path / "fresh"))
    assert tree(tmp_path / "mended") == tree(tmp_path / "fresh")
    assert documents(tmp_path / "aside") == documents(tmp_path / "fresh")


def test_an_input_that_grew_or_moved_a_line_border_is_made_again(tmp_path, write_jsonl):
    """What an interrupted run did is kept only where the lines of each split are still the same ones."""
    bad = tmp_path / "bad.jsonl"
    short, cross = {"text": "x" * 950}, '{"text": "' + "y" * 100 + '"}'
    tail = "".join(json.dumps({"text": f"z {i}"}) + "\n" for i in range(100))
    before = json.dumps(short) + "\n" + cross + " " * 100 + "\n" + tail
    hidden = json.dumps(short) + "\n" + cross + '\n{"text": "hidden"}'.ljust(100) + "\n" + tail
    assert len(before) == len(hidden)
    for name, after in {
        "grown": before + tail,
        "grown by no newline": before[:-1] + " \n" + tail,
        "moved": hidden,
        "cut": before[:1500],
    }.items():
        source = tmp_path / f"{name}.jsonl"
        source.write_text(before[:-1] if "no newline" in name else before)
        bad.write_text("bad\n")
        with pytest.raises(UserError, match="not JSON"):
            tokenize([source, bad], options(tmp_path / name, split_bytes=1024))
        source.write_text(after[: after.rindex("\n") + 1])
        bad.write_text('{"text": "good"}\n')
        tokenize([source, bad], options(tmp_path / name, split_bytes=1024))
        tokenize([source, bad], options(tmp_path / f"{name} fresh", split_bytes=1024))
        kept, fresh = tree(tmp_path / name), tree(tmp_path / f"{name} fresh")
        assert {path: data for path, data in kept.items() if path in fresh} == fresh


def test_names_do_not_collide_and_nobody_elses_files_are_touched(tmp_path, write_jsonl):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
    inputs = [
        write_jsonl(["one"], "x/a.jsonl"),
        write_jsonl(["two"], "y/a.jsonl"),
        write_jsonl(["three"], "a~2.jsonl"),
    ]
    out = tmp_path / "out"
    (out / ".mm-build" / "sub").mkdir(parents=True)
    for name in ("movie.partial", "x.7.partial", ".mm-build/mine.txt", ".mm-build/sub/mine.txt"):
        (out / name).write_text("mine")
    manifest = tokenize(inputs, options(out)).manifest
    assert [entry.name for entry in manifest.shards] == ["a-00000", "a~3-00000", "a~2-00000"]
    assert [REFERENCE.decode(document) for document in documents(out)] == ["one", "two", "three"]
    assert len([data for data in tree(out).values() if data == b"mine"]) == 4


def test_an_unfinished_build_goes_on_only_as_it_was_begun(tmp_path, source):
    source.write_bytes(source.read_bytes() + b"oops\n")
    with pytest.raises(UserError, match="not JSON"):
        tokenize([source], options(tmp_path / "out"))
    with pytest.raises(
        UserError,
        match=r"unfinished build with other options: `split_bytes` is 8KiB there and 9000 here.*delete",
    ):
        tokenize([source], options(tmp_path / "out", split_bytes=9000))


def test_a_wrong_field_can_be_corrected_at_once(tmp_path):
    source = tmp_path / "x.jsonl"
    source.write_text('{"content": "a"}\n')
    with pytest.raises(UserError, match="x.jsonl:1: no field 'text' .*`field`"):
        tokenize([source], options(tmp_path / "out"))
    assert tokenize([source], options(tmp_path / "out", field="content")).manifest.num_documents == 1


def test_one_endless_word_is_named(tmp_path, write_jsonl):
    source = write_jsonl(["fine", "x" * 1_000_001])
    with pytest.raises(
        UserError, match=r"text\.jsonl:2: one word of 1,000,001 characters, .*`max_word_chars`"
    ):
        tokenize([source], options(tmp_path / "out", split_bytes=2**26))
    assert (
        tokenize(
            [source], options(tmp_path / "out", split_bytes=2**26, max_word_chars=2_000_000)
        ).manifest.num_documents
        == 2
    )


def test_a_large_vocabulary_says_so_and_takes_int32(tmp_path, write_jsonl):
    told = json.loads((SHIPPED["default"] / "tokenizer.json").read_text())
    told["added_tokens"] += [
        {**told["added_tokens"][0], "id": 6400 + i, "content": f"<|extra{i}|>"} for i in range(60_000)
    ]
    folder = tmp_path / "tok"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(told))
    (folder / "tokenizer_config.json").write_text((SHIPPED["default"] / "tokenizer_config.json").read_text())
    said = []
    source = write_jsonl(["before <|extra59999|> after"])
    manifest = tokenize([source], options(tmp_path / "out", tokenizer=folder), say=said.append).manifest
    assert manifest.dtype == "int32"
    assert any("66,400 entries, over 65,536: tokens take 4 bytes" in one for one in said)
    assert 66_399 in ShardSet.open(tmp_path / "out").shard(0).tokens


def test_an_input_that_changes_under_the_build_is_noticed(tmp_path, source):
    def change(_):
        with source.open("ab") as file:
            file.write(b'{"text": "more"}\n')

    with pytest.raises(UserError, match="was changed while it was being read"):
        tokenize([source], options(tmp_path / "out"), say=change)


def test_an_input_that_shrank_leaves_no_shard_of_what_is_gone(tmp_path, source):
    whole = source.read_bytes()
    source.write_bytes(whole + b"bad\n")
    with pytest.raises(UserError):
        tokenize([source], options(tmp_path / "out"))
    assert len(list((tmp_path / "out").glob("*.bin"))) > 5
    source.write_bytes(b"".join(whole.splitlines(keepends=True)[:60]))
    tokenize([source], options(tmp_path / "out"))
    tokenize([source], options(tmp_path / "anew"))
    assert tree(tmp_path / "out") == tree(tmp_path / "anew")


def test_inputs_may_be_named_in_another_way_when_a_build_goes_on(tmp_path, source, monkeypatch):
    good = source.read_bytes()
    source.write_bytes(good + b"bad\n")
    with pytest.raises(UserError):
        tokenize([source], options(tmp_path / "out"))
    source.write_bytes(good)
    monkeypatch.chdir(source.parent)
    assert tokenize([Path("./text.jsonl")], options(tmp_path / "out")).kept_shards > 0


def test_the_file_of_bad_records_is_verified_like_the_rest(tmp_path, source):
    source.write_bytes(source.read_bytes() + b"bad\n")
    tokenize([source], options(tmp_path / "out", on_bad_record="set-aside"))
    assert not verify(tmp_path / "out").problems
    path = tmp_path / "out" / "set-aside.jsonl"
    path.write_bytes(path.read_bytes().replace(b"bad", b"bat"))
    assert "set-aside.jsonl: SHA-256" in verify(tmp_path / "out").problems[0]
    said = []
    tokenize([source], options(tmp_path / "out", on_bad_record="set-aside"), say=said.append)
    assert "set-aside.jsonl: missing or changed; delete manifest.json and run" in said[0]


def test_a_late_writer_does_no_harm(tmp_path):
    late = ShardWriter(tmp_path, "text-00000", "uint16")
    late.append(np.array([1, 2], "<u2"), np.array([2]))
    remove_partials(tmp_path)  # what the next build does first
    with ShardWriter(tmp_path, "text-00000", "uint16") as writer:
        writer.append(np.array([1, 5, 2], "<u2"), np.array([3]))
        writer.commit()
    whole = tree(tmp_path)
    with pytest.raises(FileNotFoundError, match="removed by another run"), late:
        late.commit()
    assert tree(tmp_path) == whole


@pytest.mark.parametrize("masked", [False, True])
def test_a_disk_that_takes_nothing_at_the_last_flush_is_left_with_nothing(tmp_path, masked):
    def write():
        with ShardWriter(tmp_path, "text-00000", "uint16", masked=masked) as writer:
            mask = np.ones(2, np.uint8) if masked else None
            writer.append(np.array([1, 2], "<u2"), np.array([2]), mask)  # fewer bytes than are held back
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, former[1]))

    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match="File too large"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("place", ["file", "below a file"])
def test_a_folder_that_cannot_be_written(tmp_path, source, place):
    (tmp_path / "file").touch()
    out = tmp_path / "file" if place == "file" else tmp_path / "file" / "out"
    with pytest.raises(UserError, match="cannot be written .*`out`"):
        tokenize([source], options(out))
