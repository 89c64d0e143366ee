"""What a tokenizer is called, as far as its files say."""

import json

import pytest

from minimind_data.dataset.format import TokenizerInfo
from minimind_data.tokenizer.loading import load_tokenizer
from minimind_data.tokenizer.naming import description_of, kind_of_tokenizer, name_of, summary_of
from minimind_data.tokenizer.places import SHIPPED

UNKNOWN = TokenizerInfo(sha256="0" * 64, vocab_size=1000, bos_id=1, eos_id=2, pad_id=0)


def test_a_known_tokenizer_has_a_name():
    info = load_tokenizer().info
    assert name_of(info) == "minimind3"
    assert summary_of(info) == f"minimind3 (6,400 entries, {info.sha256[:12]}…)"
    assert name_of(UNKNOWN) is None
    assert summary_of(UNKNOWN) == "one of 1,000 entries, 000000000000…"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ({"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel"}}, "byte-level BPE"),
        (
            {
                "model": {"type": "BPE"},
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}]},
            },
            "byte-level BPE",
        ),
        ({"model": {"type": "BPE"}, "decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}]}}, "BPE"),
        ({"model": {"type": "Unigram"}, "pre_tokenizer": None}, "Unigram"),
        ({"model": {}}, ""),
        ({"model": []}, ""),
        ([], ""),
    ],
)
def test_its_kind_is_in_its_file(content, kind):
    assert kind_of_tokenizer(json.dumps(content)) == kind
    assert kind_of_tokenizer(json.dumps(content)[:-1]) == ""


def test_a_description_says_what_is_known():
    text = (SHIPPED["default"] / "tokenizer.json").read_text("utf-8")
    assert description_of(UNKNOWN, text) == (
        "byte-level BPE, 1,000 entries, BOS <|im_start|> (1), EOS <|im_end|> (2), PAD <|endoftext|> (0), 000000000000… "
        "(it is not recorded where it came from)"
    )
    assert description_of(UNKNOWN, "").startswith("1,000 entries, BOS 1, EOS 2, PAD 0, ")
