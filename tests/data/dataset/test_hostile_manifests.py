"""A manifest can say anything: it opens, or one sentence says what is wrong with it, and nothing outside of its folder is ever touched."""

import json
import shutil

import pytest

from minimind_data.dataset.format import FormatError, Manifest
from minimind_data.dataset.shard_set import ShardSet
from tests.helpers.commands import mm_data
from tests.helpers.datasets import chat_dataset, text_dataset
from tests.helpers.mutations import mutations, snapshot, write_manifest


def content_of(folder):
    content = json.loads((folder / "manifest.json").read_bytes())
    del content["checksum"]
    return content


def refusal_of(folder):
    """The sentence by which a dataset is refused; None where it opens, and all its shards too."""
    try:
        for shard in ShardSet.open(folder):
            shard.sequence_of(0)
    except FormatError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", ["pretrain", "dpo"])
def test_every_value_is_taken_or_refused_in_one_sentence(tmp_path, kind):
    folder = (
        text_dataset(tmp_path / "data") if kind == "pretrain" else chat_dataset(tmp_path / "chats", "dpo", 4)
    )
    content = content_of(folder)
    write_manifest(folder, content)
    assert Manifest.read(folder).to_json()
    refused = 0
    for change, changed in mutations(content):
        write_manifest(folder, changed)
        sentence = refusal_of(folder)
        assert sentence is None or ("\n" not in sentence and len(sentence) < 600), change
        refused += sentence is not None
    assert refused > 300


NAMES = [
    "../outside/victim",
    "/abs/victim",
    "..",
    ".",
    "",
    "a/b",
    "a\\b",
    "a\nb",
    "a\x00b",
    "\x1b[2J",
    "x" * 256,
]


@pytest.mark.parametrize("command", ["verify", "tokenize", "merge", "convert", "shuffle", "info", "stats"])
def test_a_name_leads_nowhere(tmp_path, command):
    home = tmp_path / "home"
    folder = chat_dataset(home, "sft", 4)
    content = content_of(folder)
    outside = home / "outside"
    outside.mkdir()
    for suffix in (".bin", ".idx", ".mask"):
        shutil.copy(folder / f"{content['shards'][0]['name']}{suffix}", outside / f"victim{suffix}")
    arguments = {
        "tokenize": [
            "tokenize",
            home / "chats.jsonl",
            "--kind",
            "sft",
            "--out",
            folder,
            "--workers",
            1,
            "--split-bytes",
            2048,
        ],
        "merge": ["merge", folder, folder, "--out", home / "new"],
        "convert": ["convert", folder, "--to", "hf", "--out", home / "new"],
        "shuffle": ["shuffle", folder, "--out", home / "new"],
    }.get(command, [command, folder])
    for name in [*NAMES, str(outside / "victim")]:
        content["shards"][0]["name"] = name
        write_manifest(folder, content)
        before = snapshot(home)
        result = mm_data(*arguments)
        assert result.exit_code == 1, (name, result.output)
        assert "shards[0].name is" in result.output
        assert "Traceback" not in result.output
        assert snapshot(home) == before, name


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokens": 7}, "7 tokens of 2 bytes in"),
        ({"sequences": 7}, "7 sequences in"),
        ({"mask_sha256": "0" * 64}, "has a mask, and the kind is pretrain"),
        ({"input": 1}, "is of input 1, and there are 1"),
        ({"name": "text-00001"}, "two shards are called 'text-00001'"),
        ({"bytes": 2**53 - 2, "tokens": 2**52 - 1}, "bytes together"),
    ],
)
def test_facts_that_cannot_both_be_true_are_named(tmp_path, change, sentence):
    folder = text_dataset(tmp_path / "data")
    content = content_of(folder)
    content["shards"][0] |= change
    write_manifest(folder, content)
    with pytest.raises(FormatError, match=sentence):
        Manifest.read(folder)


def test_a_special_token_beyond_the_vocabulary_is_named(tmp_path):
    folder = text_dataset(tmp_path / "data")
    content = content_of(folder)
    content["tokenizer"]["pad_id"] = content["tokenizer"]["vocab_size"]
    write_manifest(folder, content)
    with pytest.raises(FormatError, match="in a vocabulary of 259"):
        Manifest.read(folder)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000, "1" * 5000]
)
def test_brackets_without_end_are_a_sentence(tmp_path, text):
    folder = text_dataset(tmp_path / "data")
    (folder / "manifest.json").write_text(text)
    result = mm_data("info", folder)
    assert result.exit_code == 1
    assert "manifest.json: edited or damaged" in result.output
