"""A build harms nobody's files: it is refused before it writes anything, wherever a file that it would write belongs to somebody else."""

import errno
import json
import os
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minimind_data.build.pipeline import tokenize
from minimind_data.dataset.format import REMAKE_ALL
from minimind_data.dataset.verification import verify
from minimind_data.errors import UserError
from tests.helpers.builds import options, tree
from tests.helpers.commands import mm_data
from tests.helpers.mutations import snapshot

TEXTS = [f"w{3 + i % 40} w5" for i in range(300)]
SETTINGS = {"split_bytes": 1024, "val_fraction": 0.2}
NAMES = [
    "manifest.json", "tokenizer.json", "tokenizer_config.json", "set-aside.jsonl", "text-00000.bin", "text-00000.idx", "text-00002.bin",
    "val/manifest.json", "val/tokenizer.json", "val/tokenizer_config.json", "val/text-00001.bin", "val/text-00001.idx", ".mm-build",
]  # fmt: skip
"""Files that a build with `SETTINGS` of one text.jsonl writes."""
OTHERS = [
    "note.txt",
    "val/x.bin",
    "other-00000.bin",
    "text-00000.mask",
    "val/set-aside.jsonl",
    "data.parquet",
    "val/deep/manifest.json",
]
"""Files that it does not write."""


@pytest.fixture
def source(write_jsonl):
    return write_jsonl(TEXTS)


@pytest.fixture
def templated(small_tokenizer):
    """A tokenizer with a chat template, so that a dataset has a tokenizer_config.json."""
    (small_tokenizer / "chat_template.jinja").write_text("{{ messages }}")
    return small_tokenizer


def put(path, kind):
    """Put something of a stranger's at a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "link":
        path.symlink_to(path.parent / "nowhere" / "at all")
    elif kind == "folder":
        path.mkdir()
        (path / "note.txt").write_text("somebody's")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_text({"empty": "", "text": "somebody's"}.get(kind, '{"name": "an app", "version": 3}'))


def refusal(home, source, **changes):
    """The sentence by which a build is refused, in which everything stays as it was."""
    before = snapshot(home), tree(home)
    links = {path: path.readlink() for path in home.rglob("*") if path.is_symlink()}
    with pytest.raises(UserError) as error:
        tokenize([source], options(home / "out", **SETTINGS | changes))
    assert (snapshot(home), tree(home)) == before
    assert {path: path.readlink() for path in home.rglob("*") if path.is_symlink()} == links
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", ["empty", "text", "json", "link", "folder", "pipe"])
@pytest.mark.parametrize("name", NAMES)
def test_a_strangers_file_in_any_place_that_a_build_writes(tmp_path, source, templated, name, kind):
    if (name, kind) == (".mm-build", "folder"):
        pytest.skip("a folder of that name is the build's own")
    path = tmp_path / "home" / "out" / name
    put(path, kind)
    assert str(path) in refusal(tmp_path / "home", source, tokenizer=templated)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    foreign=st.dictionaries(
        st.sampled_from([*NAMES, *OTHERS]), st.sampled_from(["empty", "text", "json", "link", "folder"])
    )
)
def test_any_arrangement_of_strangers_files(tmp_path_factory, source, templated, foreign):
    """The build is refused where one of its names is taken, and else leaves all other files as they are."""
    home = tmp_path_factory.mktemp("home")
    for name, kind in foreign.items():
        put(home / "out" / name, kind)
    taken = {name for name, kind in foreign.items() if (name, kind) != (".mm-build", "folder")}
    if taken & set(NAMES):
        refusal(home, source, tokenizer=templated)
        return
    before = snapshot(home / "out")
    tokenize([source], options(home / "out", tokenizer=templated, **SETTINGS))
    assert verify(home / "out").problems == ()
    changed = {path for path, state in before.items() if snapshot(home / "out").get(path) != state}
    assert changed <= {str(home / "out" / ".mm-build")}


def test_a_file_beside_a_finished_dataset_stops_its_growth(tmp_path, source, write_jsonl):
    out = tmp_path / "home" / "out"
    tokenize([source], options(out, **SETTINGS))
    more = write_jsonl(TEXTS[:20], "more.jsonl")
    for name in ("more-00000.bin", "val/more-00000.idx", "val/more-00000.bin"):
        (out / name).write_text("somebody's")
        before = snapshot(tmp_path / "home")
        with pytest.raises(UserError, match=f"{name}: a file of something else"):
            tokenize([source, more], options(out, **SETTINGS))
        assert snapshot(tmp_path / "home") == before
        (out / name).unlink()
    tokenize([source, more], options(out, **SETTINGS))
    assert verify(out).problems == ()


def test_files_in_a_folder_val_stay_where_no_validation_part_is_made(tmp_path, source, write_jsonl):
    """Also when splits disappear, whose shards are then removed."""
    out = tmp_path / "out"
    tokenize([source], options(tmp_path / "other", **SETTINGS))
    shutil.copytree(
        tmp_path / "other", out / "val"
    )  # a whole dataset of the user's, with shards of the same names
    mine = tree(out / "val")
    tokenize([source], options(out, split_bytes=1024))
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:50]))
    tokenize([source], options(out, split_bytes=1024))
    assert tree(out / "val") == mine
    assert not (out / "text-00003.bin").exists()


def test_a_loss_mask_beside_texts_is_not_the_builds(tmp_path, source):
    out = tmp_path / "out"
    tokenize([source], options(out, split_bytes=1024))
    (out / "text-00003.mask").write_text("somebody's")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:50]))
    tokenize([source], options(out, split_bytes=1024))
    assert (out / "text-00003.mask").read_text() == "somebody's"
    assert not (out / "text-00003.bin").exists()


def test_an_unfinished_build_of_another_recipe_leaves_nothing_behind(tmp_path, source, monkeypatch):
    """A process killed between a shard and its result; the next build makes no validation part."""
    out, right = tmp_path / "out", tmp_path / "right"
    with monkeypatch.context() as patch:
        patch.setattr("minimind_data.build.work_folder.WorkFolder.write_result", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tokenize([source], options(out, **SETTINGS))
    assert list((out / "val").glob("*.bin"))
    tokenize([source], options(out, split_bytes=2048))
    tokenize([source], options(right, split_bytes=2048))
    assert tree(out) == tree(right)


@pytest.mark.parametrize("folder", ["a model", "a model by its config alone", "adapters", "a training run"])
def test_the_folder_of_a_run_or_of_a_model(tmp_path, source, folder):
    out = tmp_path / "home" / "out"
    out.mkdir(parents=True)
    if folder == "a model":
        (out / "model.safetensors").write_bytes(b"weights")
    elif folder == "a model by its config alone":
        (out / "config.json").write_text('{"model_type": "qwen3"}')
    elif folder == "adapters":
        (out / "adapter_config.json").write_text("{}")
    else:
        (out / "config.json").write_text('{"command": "pretrain"}')
        (out / "checkpoints").mkdir()
    owner = "a training run" if folder == "a training run" else "a model"
    assert f"{out}: the folder of {owner}" in refusal(tmp_path / "home", source)


def test_a_manifest_of_another_program_is_not_called_damaged(tmp_path, source):
    put(tmp_path / "home" / "out" / "manifest.json", "json")
    assert "delete" not in refusal(tmp_path / "home", source)


def test_an_out_that_is_a_link(tmp_path, source):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "out").symlink_to(tmp_path / "home" / "gone")
    assert "out: a link that leads nowhere" in refusal(tmp_path / "home", source)
    (tmp_path / "home" / "gone").mkdir()
    tokenize([source], options(tmp_path / "home" / "out"))
    assert verify(tmp_path / "home" / "gone").problems == ()


@pytest.mark.parametrize("place", [".", "data", "deep/data"])
def test_an_output_folder_in_an_input_folder_is_refused_on_the_first_run(tmp_path, source, place):
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(source, home)
    before = snapshot(home)
    with pytest.raises(
        UserError, match=r"the input folder .*, so the next run would read the dataset as text"
    ):
        tokenize([home], options(home / place))
    assert snapshot(home) == before


def test_a_dataset_in_a_hidden_folder_of_its_input_is_no_input(tmp_path, source):
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(source, home)
    for already_done in (False, True):
        assert tokenize([home], options(home / ".data")).already_done is already_done


def test_an_input_that_the_build_would_write(tmp_path, templated):
    home = tmp_path / "home"
    (home / "out").mkdir(parents=True)
    (home / "text.jsonl").write_text('{"text": "w5 w6"}\n{"text": 5}\n')
    chosen = {"on_bad_record": "set-aside", "tokenizer": templated}
    tokenize([home / "text.jsonl"], options(home / "out", **chosen))
    bad = home / "out" / "set-aside.jsonl"
    before = snapshot(home)
    for inputs in ([home / "text.jsonl", bad], [home / "text.jsonl", home / "out" / "*.jsonl"]):
        with pytest.raises(UserError, match=r"set-aside.jsonl"):
            tokenize(inputs, options(home / "out", **chosen))
    assert snapshot(home) == before


def test_a_link_to_an_input_folder_is_seen_through(tmp_path, source):
    (tmp_path / "real").mkdir()
    shutil.copy(source, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(UserError, match="input folder"):
        tokenize([tmp_path / "link"], options(tmp_path / "real" / "data"))


@pytest.mark.parametrize("damage", ["tokens", "manifest"])
def test_a_dataset_whose_manifest_was_deleted_is_made_anew(tmp_path, source, templated, damage):
    """As its own messages advise."""
    assert "delete manifest.json" in REMAKE_ALL
    out = tmp_path / "out"
    chosen = SETTINGS | {"tokenizer": templated}
    tokenize([source], options(out, **chosen))
    whole = tree(out)
    (out / "manifest.json").unlink()
    if damage == "tokens":
        (out / "text-00000.bin").write_bytes(b"damaged")
    tokenize([source], options(out, **chosen))
    assert tree(out) == whole


def test_shards_of_another_tokenizer_without_a_manifest_are_somebodys(tmp_path, source, small_tokenizer):
    out = tmp_path / "home" / "out"
    tokenize([source], options(out, **SETTINGS))
    (out / "manifest.json").unlink()
    assert "tokenizer.json: a file of something else" in refusal(
        tmp_path / "home", source, tokenizer=small_tokenizer
    )


def test_standard_input_is_not_left_behind(tmp_path):
    home = tmp_path / "home"
    put(home / "out" / "stdin-00000.bin", "text")
    before = snapshot(home)
    result = mm_data("tokenize", "-", "--out", home / "out", input='{"text": "hello"}\n')
    assert result.exit_code == 1
    assert "stdin-00000.bin: a file of something else" in result.output
    assert snapshot(home) == before


def test_an_error_after_the_manifest_says_that_the_dataset_is_complete(tmp_path, source, monkeypatch):
    out = tmp_path / "out"
    tokenize([source], options(tmp_path / "right", **SETTINGS))
    unlink = os.unlink

    def full(path, *arguments, **named):
        if (out / "manifest.json").exists() and "/.mm-build/" in os.fspath(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))
        return unlink(path, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", full)
        with pytest.raises(
            UserError, match=rf"/\.mm-build/.*: cannot be removed .*; the dataset in {out} is complete"
        ):
            tokenize([source], options(out, **SETTINGS))
    assert verify(out).problems == ()
    assert tokenize([source], options(out, **SETTINGS)).already_done
    assert tree(out) == tree(tmp_path / "right")
