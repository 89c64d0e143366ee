"""Token bytes: they add up to the text, and cells never cut a character."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_data.tokenizer.edge_cases import edge_case_texts
from minimind_data.tokenizer.loading import Tokenizer, load_tokenizer
from minimind_data.tokenizer.token_bytes import cells_of, token_bytes_of

SAMPLE = Path(__file__).parents[3] / "data" / "sample.jsonl"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def texts_of(tokenizer):
    sample = [json.loads(line)["text"] for line in SAMPLE.read_text("utf-8").splitlines()[:100]]
    return edge_case_texts(tokenizer.added_tokens) + sample


def encode(tokenizer, text):
    return tokenizer.reference.encode(text, add_special_tokens=False).ids


def test_bytes_end_to_end_are_the_text(tokenizer):
    token_bytes = token_bytes_of(tokenizer)
    assert token_bytes.is_exact
    assert len(token_bytes.byte_strings) == tokenizer.info.vocab_size
    for text in texts_of(tokenizer):
        ids = encode(tokenizer, text)
        assert b"".join(token_bytes.byte_strings[token] for token in ids) == text.encode()
        assert token_bytes.num_characters[ids].sum() == len(text)
        assert token_bytes.num_bytes[ids].sum() == len(text.encode())


def other_tokenizer(vocabulary, decoder):
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    told = {"version": "1.0", "added_tokens": [], "model": model, "decoder": decoder}
    told |= {"normalizer": None, "pre_tokenizer": None, "post_processor": None}
    text = json.dumps(told)
    return Tokenizer(text, tokenizers.Tokenizer.from_str(text), (0, 0, 0))


def test_other_vocabularies_are_shown_but_not_counted():
    vocabulary = {"<unk>": 0, "▁a": 1, "<0xE4>": 2, "é": 4}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    token_bytes = token_bytes_of(other_tokenizer(vocabulary, metaspace))
    assert not token_bytes.is_exact
    assert token_bytes.byte_strings == (b"<unk>", b" a", b"\xe4", b"", "é".encode())
    assert token_bytes_of(other_tokenizer(vocabulary, None)).byte_strings[1] == "▁a".encode()


BYTES = [b"a", b"bc", "你".encode(), b"\xe4", b"\xbd\xa0", b"\xbd", b"\xa0!", b"", "é".encode() + b"\xf0\x9f"]


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        ([0, 2, 1], [(1, "a", False), (1, "你", False), (1, "bc", False)]),
        ([3, 4, 0], [(2, "你", False), (1, "a", False)]),
        ([3, 5, 6], [(3, "你!", False)]),
        ([4, 0], [(1, "\\xbd\\xa0", True), (1, "a", False)]),  # a window that begins inside a character
        ([6], [(1, "\\xa0!", True)]),
        ([0, 3, 5], [(1, "a", False), (1, "\\xe4", True), (1, "\\xbd", True)]),  # one that ends inside one
        ([3, 0, 3, 4], [(1, "\\xe4", True), (1, "a", False), (2, "你", False)]),
        ([8, 2], [(1, "é\\xf0\\x9f", True), (1, "你", False)]),
        ([7], [(1, "", False)]),
        ([], []),
    ],
)
def test_cells(ids, wanted):
    assert [(cell.count, cell.text, cell.broken) for cell in cells_of(ids, BYTES)] == wanted


@settings(deadline=None)
@given(st.lists(st.integers(0, len(BYTES) - 1), max_size=30))
def test_cells_cover_every_token_once_and_only_broken_ones_are_not_text(ids):
    cells = cells_of(ids, BYTES)
    assert [token for cell in cells for token in range(cell.first, cell.first + cell.count)] == list(
        range(len(ids))
    )
    for cell in cells:
        held = b"".join(BYTES[token] for token in ids[cell.first : cell.first + cell.count])
        assert cell.text == held.decode(errors="backslashreplace" if cell.broken else "strict")
        assert cell.count == 1 or not cell.broken


def test_cells_of_a_whole_text_are_the_text(tokenizer):
    token_bytes = token_bytes_of(tokenizer)
    for text in texts_of(tokenizer):
        cells = cells_of(encode(tokenizer, text), token_bytes.byte_strings)
        assert "".join(cell.text for cell in cells) == text
        assert not any(cell.broken for cell in cells)
