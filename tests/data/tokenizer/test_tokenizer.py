"""The tokenizer: ids are the reference's, whoever encodes; a backend that lies is found out."""

import json
import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.errors import UserError
from minimind_data.inputs.splits import texts_of
from minimind_data.tokenizer import backends
from minimind_data.tokenizer import training as train_module
from minimind_data.tokenizer.backends import (
    FastokensEncoder,
    ReferenceEncoder,
    choose_backend,
    first_difference,
)
from minimind_data.tokenizer.edge_cases import edge_case_texts
from minimind_data.tokenizer.loading import SpecialTokens, load_tokenizer
from minimind_data.tokenizer.places import SHIPPED
from minimind_data.tokenizer.training import SPECIAL_TOKENS, train_tokenizer

DEFAULT = load_tokenizer()


def test_the_default_tokenizer_is_minimind_shaped():
    assert DEFAULT.info.vocab_size == 6400
    assert (DEFAULT.info.pad_id, DEFAULT.info.bos_id, DEFAULT.info.eos_id) == (0, 1, 2)
    ids = [
        DEFAULT.reference.token_to_id(token)
        for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "<|buffer9|>")
    ]
    assert ids == [0, 1, 2, 21, 35]
    assert [DEFAULT.reference.id_to_token(i) for i in range(36)] == SPECIAL_TOKENS
    assert (
        DEFAULT.decode(DEFAULT.reference.encode("<think>好\x00🙂</think>").ids) == "<think>好\x00🙂</think>"
    )


@settings(deadline=None, max_examples=300)
@given(st.lists(st.text(max_size=60), max_size=8))
def test_the_fast_encoder_is_exact(texts):
    texts += [f"{text}<|im_end|>{text}" for text in texts]
    ids, offsets = FastokensEncoder(DEFAULT).encode_batch(texts)
    assert first_difference(DEFAULT, texts, ids, offsets) is None


def test_the_fast_encoder_is_chosen_for_the_default_tokenizer():
    choice = choose_backend(DEFAULT, "auto", ["some text", "一些文字"])
    assert choice.name == "fastokens"
    assert "2 sample texts" in choice.note


class _Lying:
    """An encoder that is right but for one of the edge cases."""

    name = "fastokens"

    def __init__(self, tokenizer):
        self._right = ReferenceEncoder(tokenizer)

    def encode_batch(self, texts):
        ids, offsets = self._right.encode_batch(texts)
        if "we'll" in texts or len(texts) > 100:
            ids = ids.copy()
            ids[len(ids) // 2] ^= 1
        return ids, offsets


class _Failing:
    def __init__(self, tokenizer):
        raise BaseException("a panic in Rust")  # noqa: TRY002 - what a panic looks like


def _absent(tokenizer):
    raise ImportError


@pytest.mark.parametrize(
    ("encoder", "reason"),
    [
        (_Lying, "gives other ids than tokenizers for"),
        (_Failing, "a panic in Rust"),
        (_absent, "is not installed"),
    ],
)
def test_a_backend_that_does_not_agree_does_no_work(monkeypatch, encoder, reason):
    monkeypatch.setitem(backends.FAST_BACKENDS, "fastokens", encoder)
    choice = choose_backend(DEFAULT, "auto", [])
    assert choice.name == "tokenizers"
    assert reason in choice.note
    with pytest.raises(UserError, match=reason):
        choose_backend(DEFAULT, "fastokens", [])


def test_a_difference_in_the_sample_alone_is_found(monkeypatch):
    class OnlySample(_Lying):
        def encode_batch(self, texts):
            ids, offsets = self._right.encode_batch(texts)
            ids = ids.copy()
            ids[-1] ^= 1  # the last text is the last of the sample
            return ids, offsets

    monkeypatch.setitem(backends.FAST_BACKENDS, "fastokens", OnlySample)
    assert "'the sample'" in choose_backend(DEFAULT, "auto", ["the sample"]).note


def test_the_edge_cases_hold_every_added_token_and_are_always_the_same():
    texts = edge_case_texts(DEFAULT.added_tokens)
    assert texts == edge_case_texts(DEFAULT.added_tokens)
    assert all(any(f"a{token}b" in text for text in texts) for token in SPECIAL_TOKENS)
    assert len("".join(texts).encode()) < 60_000


def test_first_difference_names_the_text():
    texts = ["one", "two", "three"]
    ids, offsets = ReferenceEncoder(DEFAULT).encode_batch(texts)
    assert first_difference(DEFAULT, texts, ids, offsets) is None
    wrong = ids.copy()
    wrong[offsets[1]] += 1
    assert first_difference(DEFAULT, texts, wrong, offsets) == 1
    assert first_difference(DEFAULT, texts, ids[:-1], np.append(offsets[:-1], offsets[-1] - 1)) == 2


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(SHIPPED["default"], tmp_path / "tok")
    return tmp_path / "tok"


def test_special_tokens_come_from_config_or_flags(folder):
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "pad_token": None})
    )
    with pytest.raises(UserError, match="nothing says which token is PAD .*`pad_token`"):
        load_tokenizer(folder)
    info = load_tokenizer(folder, SpecialTokens(pad="<|endoftext|>")).info
    assert (info.bos_id, info.eos_id, info.pad_id) == (1, 2, 0)
    with pytest.raises(UserError, match="'<nope>', which is not in its vocabulary; pass another `bos_token`"):
        load_tokenizer(folder, SpecialTokens(bos="<nope>", pad="<|endoftext|>"))
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="which token is BOS .*`bos_token`"):
        load_tokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize("told", [5, ["<|im_start|>"], {"content": 7}, True])
def test_a_special_token_that_is_no_string_is_named(folder, told):
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": told}))
    with pytest.raises(
        UserError, match=r"tokenizer_config\.json: its bos_token is .*; pass `bos_token` TOKEN"
    ):
        load_tokenizer(folder)


def test_a_datasets_own_tokenizer_can_be_taken_with_one_token_changed(folder, write_jsonl, tmp_path):
    tokenize([write_jsonl(["a text"])], TokenizeOptions(out=tmp_path / "data", workers=1))
    info = load_tokenizer(tmp_path / "data").info
    assert (info.bos_id, info.eos_id, info.pad_id) == (1, 2, 0)
    info = load_tokenizer(tmp_path / "data", SpecialTokens(pad="<|im_end|>")).info
    assert (info.bos_id, info.eos_id, info.pad_id) == (1, 2, 2)


def test_a_tokenizer_without_a_token_for_everything_says_so(tmp_path, write_jsonl):
    words = tokenizers.Tokenizer(models.WordLevel({"<b>": 0, "<e>": 1, "hello": 2}, unk_token="<unk>"))
    words.add_special_tokens(["<b>", "<e>"])
    words.save(str(tmp_path / "tokenizer.json"))
    options = TokenizeOptions(
        out=tmp_path / "out",
        workers=1,
        tokenizer=tmp_path / "tokenizer.json",
        bos_token="<b>",
        eos_token="<e>",
        pad_token="<e>",
    )
    with pytest.raises(UserError, match="the tokenizer cannot encode some text .*; give it an unknown token"):
        tokenize([write_jsonl(["hello", "goodbye"])], options)


def test_an_id_beyond_int32_is_refused(folder):
    told = json.loads((folder / "tokenizer.json").read_text())
    told["model"]["vocab"]["zz"] = 2**31
    (folder / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="its largest id is 2147483648; ids must be from 0 to"):
        load_tokenizer(folder)


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe", b'{"version": "1.0"}'])
def test_no_tokenizer(folder, data):
    (folder / "tokenizer.json").write_bytes(data)
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(folder)


def test_missing_and_undecided_tokenizers(folder):
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(folder / "nope.json")
    told = json.loads((folder / "tokenizer.json").read_text())
    told["model"]["dropout"] = 0.1
    (folder / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="dropout"):
        load_tokenizer(folder)


def test_truncation_in_the_file_cuts_no_text(folder):
    told = json.loads((folder / "tokenizer.json").read_text())
    told["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(told))
    tokenizer = load_tokenizer(folder)
    text = "a longer text than three tokens"
    wanted = load_tokenizer("default").reference.encode(text, add_special_tokens=False).ids
    for encoder in (ReferenceEncoder(tokenizer), FastokensEncoder(tokenizer)):
        assert encoder.encode_batch([text])[0].tolist() == wanted


def test_training_gives_the_form_and_no_merged_special_tokens(tmp_path, write_jsonl):
    texts = [f"问题{i}的答案是{i * i}。 The answer to {i} is {i * i}.<|im_end|>" for i in range(300)]
    out = tmp_path / "tok"
    size = train_tokenizer(texts_of([write_jsonl(texts)]), out, vocab_size=400)
    tokenizer = load_tokenizer(out)
    assert size == tokenizer.info.vocab_size == 400
    assert [tokenizer.reference.id_to_token(i) for i in range(36)] == SPECIAL_TOKENS
    assert not [
        token for token in tokenizer.reference.get_vocab() if "im_end" in token and token != "<|im_end|>"
    ]
    assert tokenizer.decode(tokenizer.reference.encode("never seen: ☃").ids) == "never seen: ☃"
    hidden = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json")).decode([1, 25, 2])
    assert hidden == "<think>"
    with pytest.raises(UserError, match="need 292"):
        train_tokenizer(texts_of([tmp_path / "text.jsonl"]), out, vocab_size=291)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("tokenizer.json", "tokenizer.json: a file of something else"),
        ("tokenizer_config.json", "tokenizer_config.json: a file of something else"),
        ("chat_template.jinja", "chat_template.jinja: a file of something else"),
        ("model.safetensors", "the folder of a model"),
    ],
)
def test_training_replaces_only_what_was_trained_here(tmp_path, name, complaint):
    out = tmp_path / "tok"
    out.mkdir()
    (out / name).write_text("somebody's")
    with pytest.raises(UserError, match=complaint):
        train_tokenizer(["some text"], out, vocab_size=300)
    assert [path.name for path in out.iterdir()] == [name]
    assert (out / name).read_text() == "somebody's"
    (out / name).unlink()
    for text in ("some text", "another text"):
        train_tokenizer([text], out, vocab_size=300)
    (out / "manifest.json").write_text('{"format_version": 1}')
    with pytest.raises(UserError, match="the folder of a dataset"):
        train_tokenizer(["some text"], out, vocab_size=300)


def test_training_names_a_bad_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(UserError, match=r"x\.jsonl:2: field 'text' is a number"):
        train_tokenizer(texts_of([path]), tmp_path / "tok")


def test_an_interrupt_does_not_wait_for_the_training(tmp_path, monkeypatch):
    merged = threading.Event()
    monkeypatch.setattr(train_module, "_SECONDS_TO_STOP", 0.01)

    class Deaf:
        """The library amid its merges, when it hears no signal."""

        def __init__(self, model):
            pass

        def train_from_iterator(self, pieces, trainer):
            assert list(pieces)
            os.kill(os.getpid(), signal.SIGINT)
            merged.wait(30)

    monkeypatch.setattr(train_module.tokenizers, "Tokenizer", Deaf)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(["a", "b"], tmp_path / "tokenizer")
    merged.set()
    assert time.monotonic() - begun < 10


def test_half_a_surrogate_pair_is_no_token(folder):
    config = json.loads((folder / "tokenizer_config.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "\ud800"}))
    with pytest.raises(UserError, match="EOS should be .*, which is not in its vocabulary"):
        load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_conversations_are_learned_as_the_template_writes_them(kind, tmp_path):
    answer = [{"role": "user", "content": "zebra?"}, {"role": "assistant", "content": "quagga. <|im_end|>"}]
    other = [*answer[:1], {"role": "assistant", "content": "okapi."}]
    record = {"conversations": answer} if kind == "sft" else {"chosen": answer, "rejected": other}
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(record) + "\n")
    texts = list(texts_of([path], kind=kind))
    assert [each.count("<|im_start|>user\nzebra?<|im_end|>\n<|im_start|>assistant\n") for each in texts] == [
        1
    ] * len(texts)
    assert len(texts) == (1 if kind == "sft" else 2)
    train_tokenizer(texts * 20, tmp_path / "tok", vocab_size=400)
    trained = tokenizers.Tokenizer.from_file(str(tmp_path / "tok" / "tokenizer.json"))
    assert trained.encode("quagga", add_special_tokens=False).tokens == ["quagga"]
    assert sum("im_" in entry for entry in trained.get_vocab()) == 2


def test_a_record_of_another_kind_names_the_option(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(
        '{"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    with pytest.raises(UserError, match=r"x\.jsonl:1: no field 'text'.* let `kind` sft read such records"):
        list(texts_of([path]))
    (tmp_path / "y.txt").write_text("text")
    with pytest.raises(UserError, match=r"y\.txt: is text, where `kind` sft reads JSON lines and Parquet"):
        list(texts_of([tmp_path / "y.txt"], kind="sft"))
