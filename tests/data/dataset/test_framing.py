"""Framing and cutting documents, against the plainest way to say what they do."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minimind_data.dataset.format import TokenizerInfo
from minimind_data.dataset.framing import (
    MAX_DOCUMENT_TOKENS,
    check_ids,
    check_lengths,
    document_ranges,
    frame_documents,
    frame_texts,
)
from minimind_data.errors import UserError


@settings(max_examples=200, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=12),
    special=st.sampled_from([(1, 2), (1, 1), (None, 2)]),
)
@example(documents=[[1, 3, 2], [1, 4, 5, 2]], special=(1, 2))
@example(documents=[[1, 3, 2], [4, 2], [1, 3, 2]], special=(1, 2))
@example(documents=[[1, 3, 2], [1, 4], [1, 3, 2]], special=(1, 2))
@example(documents=[[1, 3, 2], [1, 2], [1, 3, 2]], special=(1, 2))
@example(documents=[[1, 3, 1], [1], [1, 3, 1]], special=(1, 1))
@example(documents=[[1, 3, 2], [3, 2]], special=(None, 2))
@example(documents=[[1, 3, 2], [3], [2]], special=(None, 2))
def test_framing_adds_what_is_missing_and_nothing_else(documents, special):
    bos, eos = special
    info = TokenizerInfo(sha256="", vocab_size=6, bos_id=bos, eos_id=eos, pad_id=0)
    wanted, bos_added, eos_added, empty = [], 0, 0, 0
    for document in documents:
        ids = list(document)
        has_bos = bos is not None and ids[:1] == [bos]
        ids = ids[has_bos:]
        has_eos = ids[-1:] == [eos]
        ids = ids[: len(ids) - has_eos]
        if ids:
            wanted.append([*ids, eos] if bos is None else [bos, *ids, eos])
            bos_added += bos is not None and not has_bos
            eos_added += not has_eos
        else:
            empty += 1
    tokens = np.array([token for document in documents for token in document], np.int64)
    made = frame_documents(tokens, np.array([len(one) for one in documents], np.int64), info, "uint16")
    assert [part.tolist() for part in np.split(made.tokens, np.cumsum(made.lengths)[:-1])] == (wanted or [[]])
    assert (made.bos_added, made.eos_added, made.empty) == (bos_added, eos_added, empty)


@given(texts=st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=9))
def test_texts_get_bos_and_eos_whatever_their_ids_are(texts):
    info = TokenizerInfo(sha256="", vocab_size=6, bos_id=1, eos_id=2, pad_id=0)
    ids = np.array([token for text in texts for token in text], np.uint32)
    offsets = np.cumsum([0, *map(len, texts)])
    tokens, lengths = frame_texts(ids, offsets, info, "uint16")
    framed = [[1, *text, 2] for text in texts]
    assert tokens.tolist() == [token for text in framed for token in text]
    assert lengths.tolist() == [len(text) for text in framed]
    assert tokens.dtype == np.uint16


@given(lengths=st.lists(st.integers(0, 9)), most=st.integers(1, 12))
def test_ranges_hold_every_document_once_and_as_many_as_the_bound_allows(lengths, most):
    ranges = list(document_ranges(np.array(lengths, np.int64), most))
    assert [i for first, last in ranges for i in range(first, last)] == list(range(len(lengths)))
    for first, last in ranges:
        assert last == first + 1 or sum(lengths[first:last]) <= most
        assert last == len(lengths) or sum(lengths[first : last + 1]) > most


@pytest.mark.parametrize(
    ("tokens", "place"),
    [
        ([], None),
        ([0, 9], None),
        ([0, 9, 10], 2),
        ([3, -1], 1),
        ([-1], 0),
        ([0, -1, 10], 1),
        ([10, -1], 0),
        ([5, 2**31], 1),
    ],
)
def test_the_first_id_that_no_vocabulary_has_is_named(tokens, place):
    def check():
        check_ids(np.array(tokens, np.int64), 10, lambda number: f"token {number}")

    if place is None:
        check()
        return
    with pytest.raises(
        UserError, match=f"^token {place} is {tokens[place]}, where the tokenizer has ids 0 to 9"
    ):
        check()


def test_a_document_that_no_memory_should_hold_is_refused():
    check_lengths(np.array([], np.int64), "here")
    check_lengths(np.array([3, MAX_DOCUMENT_TOKENS]), "here")
    with pytest.raises(
        UserError, match="^here: a document of 67,108,865 tokens, where at most 67,108,864 are allowed"
    ):
        check_lengths(np.array([3, MAX_DOCUMENT_TOKENS + 1]), "here")
