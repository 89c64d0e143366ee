"""A build that goes on with a dataset takes the options that it does not say from there, and refuses those that contradict."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.chat.rendering import ChatOptions
from minimind_data.dataset.merging import MergeOptions, merge
from minimind_data.errors import UserError
from minimind_data.files import checked_json
from minimind_data.inputs.spec import RecordSpec
from minimind_data.options import names_passed, options_from
from minimind_data.tokenizer.places import SHIPPED
from tests.helpers.builds import tree
from tests.helpers.chats import make_tokenizer
from tests.helpers.commands import mm_data

SHAPING = {
    "records": RecordSpec(field="body", max_word_chars=50_000),
    "dedup": "exact",
    "val_fraction": 0.2,
    "split_bytes": 2048,
}


@pytest.fixture
def a(tmp_path):
    return write_bodies(tmp_path / "a.jsonl", "a")


@pytest.fixture
def b(tmp_path):
    return write_bodies(tmp_path / "b.jsonl", "b")


def write_bodies(path: Path, name: str) -> Path:
    path.write_text("".join(json.dumps({"body": f"text {i} of {name}"}) + "\n" for i in range(99)))
    return path


def write_chats(path: Path) -> Path:
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    path.write_text(json.dumps({"conversations": turns}) + "\n")
    return path


def test_what_is_passed_is_known():
    assert names_passed(TokenizeOptions()) == frozenset()
    options = TokenizeOptions(kind="pretrain", records=RecordSpec(field="text"))
    assert options == TokenizeOptions()
    assert names_passed(options) == {"kind", "field"}
    values = {"out": Path("x"), "field": "b", "empty_think_ratio": 1.0, "kind": "sft"}
    with pytest.raises(ValueError, match="`field`, `template` and `separator` are for texts"):
        options_from(TokenizeOptions, values)
    assert names_passed(options_from(TokenizeOptions, {**values, "field": "text"})) == values.keys()
    assert names_passed(pickle.loads(pickle.dumps(options))) == {"kind", "field"}
    assert "dedup" in names_passed(replace(options, out=Path("y")))


@pytest.mark.parametrize("tokenizer", [None, "thoughts"])
def test_a_dataset_grows_by_its_own_options(tmp_path, a, b, tokenizer):
    folder = None if tokenizer is None else make_tokenizer(tmp_path / "tokenizer", tokenizer)
    out, anew = tmp_path / "out", tmp_path / "anew"
    tokenize([a], TokenizeOptions(out=out, tokenizer=folder, workers=1, **SHAPING))
    tokenize([a, b], TokenizeOptions(out=anew, tokenizer=folder, workers=1, **SHAPING))
    if folder is not None:
        (folder / "tokenizer.json").unlink()
    summary = tokenize([a, b], TokenizeOptions(out=out, workers=1))
    assert tree(out) == tree(anew)
    taken = {
        "field": "'body'", "max_word_chars": "50000", "dedup": "exact", "val_fraction": "0.2", "split_bytes": "2KiB"
    }  # fmt: skip
    assert {name: summary.options_taken[name] for name in taken} == taken
    assert ("tokenizer" in summary.options_taken) == (folder is not None)
    again = tokenize([a, b], TokenizeOptions(out=out, records=RecordSpec(field="body"), workers=1))
    assert again.already_done
    assert "field" not in again.options_taken


def test_an_unfinished_build_goes_on_by_its_own_options(tmp_path, a, b):
    folder = make_tokenizer(tmp_path / "tokenizer", "thoughts")
    whole = b.read_bytes()
    b.write_bytes(b'{"body": 7}\n' + whole)
    out = tmp_path / "out"
    with pytest.raises(UserError, match="b.jsonl:1: field 'body' is a number"):
        tokenize([a, b], TokenizeOptions(out=out, tokenizer=folder, workers=1, **SHAPING | {"dedup": "none"}))
    b.write_bytes(whole)
    with pytest.raises(
        UserError, match=r"unfinished build .*`val_fraction` is 0\.2 there and 0\.1 here; to finish it"
    ):
        tokenize([a, b], TokenizeOptions(out=out, val_fraction=0.1))
    summary = tokenize([a, b], TokenizeOptions(out=out, workers=1))
    assert summary.kept_shards > 0
    assert summary.options_taken["field"] == "'body'"
    tokenize([a, b], TokenizeOptions(out=tmp_path / "anew", tokenizer=folder, **SHAPING | {"dedup": "none"}))
    assert tree(out) == tree(tmp_path / "anew")


def test_an_unfinished_build_in_which_nothing_is_made_gives_no_options(tmp_path, a):
    with pytest.raises(UserError, match="no field 'wrong'"):
        tokenize([a], TokenizeOptions(out=tmp_path / "out", records=RecordSpec(field="wrong")))
    with pytest.raises(UserError, match="no field 'text'"):
        tokenize([a], TokenizeOptions(out=tmp_path / "out"))


def test_conversations_go_on_as_conversations(tmp_path):
    folder = make_tokenizer(tmp_path / "tokenizer", "thoughts")
    source, out = write_chats(tmp_path / "chats.jsonl"), tmp_path / "out"
    template = tmp_path / "own.jinja"
    template.write_text(json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] + "\n")
    chat = ChatOptions(chat_template=template, empty_think_ratio=0.5)
    tokenize([source], TokenizeOptions(out=out, kind="sft", tokenizer=folder, chat=chat))
    template.unlink()
    again = tokenize([source], TokenizeOptions(out=out))
    assert again.already_done
    assert (again.options_taken["kind"], again.options_taken["empty_think_ratio"]) == ("sft", "0.5")
    contradictions = [
        (TokenizeOptions(out=out, kind="dpo"), "kind"),
        (TokenizeOptions(out=out, kind="pretrain"), "kind"),
        (TokenizeOptions(out=out, records=RecordSpec(field="body")), "field"),
        (TokenizeOptions(out=out, tokenizer=folder), "chat_template"),
        (TokenizeOptions(out=out, tokenizer=SHIPPED["default"]), "tokenizer"),
    ]
    for options, name in contradictions:
        with pytest.raises(
            UserError, match=rf"out: holds a dataset that was made differently: `{name}` is"
        ) as caught:
            tokenize([source], options)
        assert caught.value.option == name


def test_a_contradiction_names_both_values_and_the_commands_that_would_do(tmp_path, a, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = mm_data("tokenize", "a.jsonl", "--out", "data", "--template", "{body}", "--dedup", "exact")
    assert first.exit_code == 0, first.output
    before = tree(tmp_path / "data")
    result = mm_data(
        "tokenize", "a.jsonl", "--out", "data", "--field", "text", "--workers", 1, "--dedup", "none"
    )
    assert result.exit_code == 1
    assert result.stderr == (
        "error: data: holds a dataset that was made differently: --template is '{body}' there and nothing here; --dedup is exact "
        "there and none here; to add to it as it is, run `mm-data tokenize a.jsonl --out data --workers 1`; for a dataset of its "
        "own, run `mm-data tokenize a.jsonl --out data-2 --field text --dedup none --workers 1`\n"
    )
    same = mm_data("tokenize", "a.jsonl", "--out", "data", "--workers", 1)
    assert same.exit_code == 0
    assert "already done" in same.stdout
    assert "options    as the dataset has them: --template '{body}', --dedup exact\n" in same.stdout
    assert tree(tmp_path / "data") == before


def test_another_tokenizer_is_named_and_not_its_checksum_alone(tmp_path, a):
    folder = make_tokenizer(tmp_path / "tokenizer", "thoughts")
    tokenize([a], TokenizeOptions(out=tmp_path / "out", records=RecordSpec(field="body")))
    match = r"`tokenizer` is minimind3 \(6,400 entries, .{13}\) there and one of "
    with pytest.raises(UserError, match=match) as caught:
        tokenize([a], TokenizeOptions(out=tmp_path / "out", tokenizer=folder))
    assert max(map(len, str(caught.value).replace("`", " ").split())) < 200
    sha256 = json.loads((tmp_path / "out" / "manifest.json").read_bytes())["tokenizer"]["sha256"]
    assert sha256 not in str(caught.value)


def test_special_tokens_that_were_named_once_need_not_be_named_again(tmp_path, a):
    bare = tmp_path / "tokenizer.json"
    bare.write_bytes((SHIPPED["default"] / "tokenizer.json").read_bytes())
    out = tmp_path / "out"
    named = {"bos_token": "<|im_end|>", "eos_token": "<|im_start|>", "pad_token": "<|endoftext|>"}
    records = RecordSpec(field="body")
    tokenize([a], TokenizeOptions(out=out, tokenizer=bare, records=records, **named))
    assert tokenize([a], TokenizeOptions(out=out, tokenizer=bare)).already_done
    assert tokenize([a], TokenizeOptions(out=out, eos_token="<|im_start|>")).already_done
    with pytest.raises(UserError, match=r"`eos_token` is '<\|im_start\|>' there and '<\|im_end\|>' here"):
        tokenize([a], TokenizeOptions(out=out, eos_token="<|im_end|>"))


def test_a_tokenizer_that_is_lost_must_be_named(tmp_path, a, b):
    folder = make_tokenizer(tmp_path / "tokenizer", "thoughts")
    out = tmp_path / "out"
    tokenize([a], TokenizeOptions(out=out, tokenizer=folder, records=RecordSpec(field="body")))
    whole = tree(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_text("{}")
        with pytest.raises(
            UserError, match=rf"out/{name}: missing or changed; name the tokenizer .* by `tokenizer`"
        ):
            tokenize([a], TokenizeOptions(out=out))
        assert tokenize([a], TokenizeOptions(out=out, tokenizer=folder)).already_done
        assert tree(out) == whole


def test_datasets_that_no_build_made_are_refused_by_name(tmp_path, a, b):
    field = RecordSpec(field="body")
    for source, name in ((a, "one"), (b, "two")):
        tokenize([source], TokenizeOptions(out=tmp_path / name, records=field, val_fraction=0.2))
    merge([tmp_path / "one", tmp_path / "two"], MergeOptions(out=tmp_path / "merged"))
    with pytest.raises(
        UserError, match=r"merged: holds a dataset that `mm-data merge` made, .*`mm-data merge` joins"
    ):
        tokenize([a], TokenizeOptions(out=tmp_path / "merged", records=field))
    with pytest.raises(UserError, match=r"one/val: the validation part of a dataset, .*take .*one as `out`"):
        tokenize([a], TokenizeOptions(out=tmp_path / "one" / "val", records=field))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("split_bytes", "much"),
        ("field", 7),
        ("dedup", "near"),
        ("split_bytes", 1),
        ("template", "{}"),
        ("of_later", 1),
    ],
)
def test_options_that_no_build_can_have_are_refused(tmp_path, a, name, value):
    out = tmp_path / "out"
    tokenize([a], TokenizeOptions(out=out, records=RecordSpec(field="body")))
    manifest = json.loads((out / "manifest.json").read_bytes())
    manifest["options"][name] = value
    for key in ("checksum", "fingerprint"):
        del manifest[key]
    with_fingerprint(out, manifest)
    with pytest.raises(UserError, match=r"out: holds a dataset (whose|with) options .*; take another `out`"):
        tokenize([a], TokenizeOptions(out=out))


def with_fingerprint(out: Path, content: dict) -> None:
    """Write a manifest whose checksums fit, as anybody can make them."""
    from minimind_data.dataset.format import Manifest
    from minimind_data.json_fields import read_fields

    fingerprint = read_fields(Manifest, dict(content)).fingerprint
    (out / "manifest.json").write_text(checked_json({**content, "fingerprint": fingerprint}, key="checksum"))
