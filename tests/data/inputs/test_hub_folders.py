"""Folders cloned from a dataset hub: what describes the data and what is held out is no input, unless it is named; it is said, and by which name."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimind_data.build.pipeline import tokenize
from minimind_data.dataset.format import Manifest
from minimind_data.errors import UserError
from minimind_data.inputs.discovery import find_sources
from tests.helpers.builds import options, tree

LINE = b'{"text": "a"}\n'
CARD = b"---\nlicense: mit\n---\n# Card\n"


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Make a folder `repo` of files by their paths; return the names of its inputs and the notes on the others."""
    monkeypatch.chdir(tmp_path)

    def call(*paths, card=CARD, named=("repo",), **more):
        for path, data in {**dict.fromkeys(paths, LINE), "README.md": card, **more}.items():
            file = tmp_path / "repo" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".parquet":
                pq.write_table(pa.table({"text": ["a"]}), file)
            else:
                file.write_bytes(data)
        sources, notes = find_sources(list(named))
        return [source.name for source in sources], notes

    return call


def test_only_the_training_split_of_a_clone_is_read(make):
    names, notes = make(
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/test-00000-of-00001.parquet",
        "data/validation-00000-of-00002.parquet",
        "data/validation-00001-of-00002.parquet",
        "dataset_infos.json",
        "LICENSE",
        "LICENSE.txt",
        ".gitattributes",
    )
    assert names == ["repo/data/train-00000-of-00002.parquet", "repo/data/train-00001-of-00002.parquet"]
    assert notes == [
        "repo: left out as metadata of the dataset: LICENSE, LICENSE.txt, README.md, …",
        (
            "repo: left out as the split test: test-00000-of-00001.parquet; to train on it too, name "
            "'repo/data/test-00000-of-00001.parquet' beside the folder"
        ),
        (
            "repo: left out as the split validation: validation-00000-of-00002.parquet, "
            "validation-00001-of-00002.parquet; to train on it too, name 'repo/data/validation-*' beside the folder"
        ),
    ]


def test_a_glob_or_a_file_takes_what_the_folder_leaves_out(make):
    paths = ("train.jsonl", "test-1.jsonl", "test-2.jsonl", "dev/a.jsonl", "dev/deep/b.jsonl")
    _, notes = make(*paths)
    patterns = [note.split("'")[1] for note in notes if "split" in note]
    assert patterns == ["repo/dev/**/*.jsonl", "repo/test-*"]
    names, notes = make(*paths, named=("repo", *patterns))
    assert sorted(names) == sorted(f"repo/{path}" for path in paths)
    assert not any("split" in note for note in notes)
    names, _ = make(*paths, named=("repo/test-1.jsonl",))
    assert names == ["repo/test-1.jsonl"]


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("test.jsonl", "test"),
        ("Test_1.jsonl", "test"),
        ("dev.jsonl", "validation"),
        ("val/a.jsonl", "validation"),
        ("en/eval2.jsonl", "test"),
        ("corpus-valid.jsonl", "validation"),
        ("test/train.jsonl", None),
        ("latest.jsonl", None),
        ("developers.jsonl", None),
        ("train_test_1.jsonl", None),
        ("\u6d4b\u8bd5.jsonl", None),
    ],
)
def test_names_tell_splits(make, path, split):
    names, notes = make("a.jsonl", path)
    assert (f"repo/{path}" in names) == (split is None)
    assert any(f"the split {split}" in note for note in notes) == (split is not None)


def test_a_folder_that_is_no_clone_is_read_whole(make):
    paths = ("train.jsonl", "test-1.jsonl", "state.json", "LICENSE.txt")
    names, notes = make(*paths, card=b"# Notes\n")
    assert sorted(names) == sorted(f"repo/{path}" for path in paths)
    assert notes == ["repo: 1 files of no known form are left out (README.md)"]


def test_a_part_of_a_clone_and_a_folder_of_clones_are_seen_as_such(make, tmp_path):
    paths = ("en/data/train.jsonl", "en/data/test.jsonl", "en/data/test/x.jsonl")
    assert make(*paths, named=("repo/en/data",))[0] == ["repo/en/data/train.jsonl"]
    assert make(*paths, named=("repo/en/data/test",))[0] == ["repo/en/data/test/x.jsonl"]
    (tmp_path / "test.jsonl").write_bytes(LINE)
    assert make(*paths, named=(".",))[0] == ["repo/en/data/train.jsonl", "test.jsonl"]


def test_a_clone_without_training_data_says_so(make, tmp_path):
    with pytest.raises(
        UserError,
        match=r"repo: a dataset folder without a split for training \(its files are of test\); .*repo/test-\*",
    ):
        make("test-1.jsonl", "test-2.jsonl")
    (tmp_path / "saved").mkdir()
    for name in ("dataset_info.json", "state.json", "data-00000-of-00001.arrow"):
        (tmp_path / "saved" / name).write_bytes(b"{}")
    with pytest.raises(UserError, match=r"saved: .*save_to_disk.*Arrow files.*to_parquet"):
        find_sources(["saved"])


def test_a_dataset_that_has_held_out_files_keeps_them(tmp_path, monkeypatch):
    """As versions that took every file of a folder made them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "dataset_infos.json").write_text(json.dumps({"text": "metadata"}))
    for name in ("test", "train"):
        (tmp_path / "repo" / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{name} text {i}"}) + "\n" for i in range(200))
        )
    out = tmp_path / "out"
    files = ["repo/dataset_infos.json", "repo/test.jsonl", "repo/train.jsonl"]
    tokenize(files, options(out))
    before = tree(out)
    notes = []
    assert tokenize(["repo"], options(out), say=notes.append).already_done
    assert any("kept, as the dataset has it" in note and "test.jsonl" in note for note in notes)
    assert tree(out) == before
    (tmp_path / "repo").rename(tmp_path / "moved")
    assert tokenize(["moved"], options(out)).already_done
    (tmp_path / "moved" / "test-new.jsonl").write_bytes(LINE)
    (tmp_path / "moved" / "train-new.jsonl").write_bytes(LINE)
    grown = tokenize(["moved"], options(out))
    assert (grown.made_shards, len(grown.manifest.inputs)) == (1, 4)


def test_an_unfinished_build_keeps_held_out_files_but_not_the_metadata_that_it_stopped_at(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "dataset_infos.json").write_bytes(b'{"default": {}}')
    for name in ("test", "train"):
        (tmp_path / "repo" / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    out = tmp_path / "out"
    files = ["repo/test.jsonl", "repo/train.jsonl", "repo/dataset_infos.json"]
    with pytest.raises(UserError, match=r"dataset_infos\.json:1: no field"):
        tokenize(files, options(out, workers=1))
    tokenize(["repo"], options(out))
    assert [entry.path for entry in Manifest.read(out).inputs] == ["repo/test.jsonl", "repo/train.jsonl"]


def test_standard_input_between_a_folder_and_a_file_of_it_doubles_nothing(make, tmp_path):
    make("train.jsonl", "test.jsonl")
    with pytest.raises(UserError, match="named twice"):
        find_sources(["repo", "-", "repo/train.jsonl"], takes_stdin=True)
    sources, _ = find_sources(["repo", "-", "repo/test.jsonl"], takes_stdin=True)
    assert [source.name for source in sources] == ["repo/train.jsonl", "-", "repo/test.jsonl"]
