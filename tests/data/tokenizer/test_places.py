"""Where a tokenizer is taken from: a path, a name, or the cache of Hugging Face's hub."""

import json
import shutil

import pytest
from huggingface_hub import constants

from minimind_data.chat.template import chat_template_of
from minimind_data.errors import UserError
from minimind_data.tokenizer.loading import load_tokenizer
from minimind_data.tokenizer.naming import name_of
from minimind_data.tokenizer.places import SHIPPED, place_of
from tests.helpers.commands import mm_data

OF_MINIMIND = {
    "minimind2": "d98595c6aef70d95f72748582fb9b4f53d76dd58c1ae1dd702ad7c84e1caf5e4",
    "minimind3": "71f32c68cf63a15355a8fc171b7594b3d41870fe0ddb54fc6aefa55f73a4a668",
}
"""SHA-256 of tokenizer.json in MiniMind's repository."""


def test_three_tokenizers_ship_and_minimind_s_are_its_own_to_the_byte():
    for name in SHIPPED:
        tokenizer = load_tokenizer(name)
        assert name_of(tokenizer.info) == name
        assert tokenizer.info.vocab_size == 6400
        assert tokenizer.info.special_ids == (1, 2, 0)
        assert chat_template_of(name) is not None
        assert tokenizer.info.sha256 == OF_MINIMIND.get(name, tokenizer.info.sha256)
    assert load_tokenizer().info == load_tokenizer("minimind3").info
    assert chat_template_of(None) == chat_template_of("minimind3")
    text = (SHIPPED["default"].parent / "LICENSE.minimind").read_text("utf-8")
    assert "Apache License" in text


def test_a_folder_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SHIPPED["default"], "minimind2")
    assert load_tokenizer("minimind2").info == load_tokenizer(SHIPPED["default"]).info
    shutil.rmtree("minimind2")
    assert load_tokenizer("minimind2").info.sha256 == OF_MINIMIND["minimind2"]


def test_the_id_of_a_model_that_was_fetched(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    model = tmp_path / "hub" / "models--someone--small"
    snapshot = model / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match="hf download someone/small tokenizer.json tokenizer_config.json"):
        load_tokenizer("someone/small")
    shutil.copytree(SHIPPED["minimind2"], snapshot)
    assert place_of("someone/small") == snapshot
    assert load_tokenizer("someone/small").info.sha256 == OF_MINIMIND["minimind2"]
    assert chat_template_of("someone/small") == chat_template_of("minimind2")


@pytest.mark.parametrize(
    "wrong", ["minimind4", "no/where/at/all", "a b/c", ".", "../x/y", "-", "someone/small"]
)
def test_what_is_no_tokenizer_is_said_with_the_names(wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="minimind3, minimind2, default|no such file") as caught:
        load_tokenizer(wrong)
    assert "\n" not in str(caught.value)


def test_the_summary_and_info_say_which_was_taken(tmp_path):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "今天天气很好"}) + "\n", "utf-8")
    for name, words in (("minimind3", []), ("minimind2", ["--tokenizer", "minimind2"])):
        made = mm_data("tokenize", tmp_path / "text.jsonl", "--out", tmp_path / name, *words)
        assert made.exit_code == 0, made.output
        assert f"tokenizer  {name} (6,400 entries, {OF_MINIMIND[name][:12]}…)" in made.stdout
        assert name in mm_data("info", tmp_path / name).stdout
    wrong = mm_data("tokenize", tmp_path / "text.jsonl", "--out", tmp_path / "x", "--tokenizer", "minimind4")
    assert wrong.exit_code == 1
    assert (
        "minimind4: no such file; --tokenizer takes a tokenizer.json, the folder of one, or minimind3, minimind2, default"
        in wrong.output
    )
