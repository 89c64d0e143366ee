"""Framing and cutting documents, against the plainest way to say what they do."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_data.dataset.format import TokenizerInfo
from minimind_data.dataset.framing import document_ranges, frame_documents


@settings(max_examples=200, deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=12), same=st.booleans())
def test_framing_adds_what_is_missing_and_nothing_else(documents, same):
    eos = 1 if same else 2
    info = TokenizerInfo(sha256="", vocab_size=6, bos_id=1, eos_id=eos, pad_id=0)
    wanted, bos_added, eos_added, empty = [], 0, 0, 0
    for document in documents:
        ids = list(document)
        has_bos = ids[:1] == [1]
        ids = ids[has_bos:]
        has_eos = ids[-1:] == [eos]
        ids = ids[: len(ids) - has_eos]
        if ids:
            wanted.append([1, *ids, eos])
            bos_added, eos_added = bos_added + (not has_bos), eos_added + (not has_eos)
        else:
            empty += 1
    tokens = np.array([token for document in documents for token in document], np.int64)
    made = frame_documents(tokens, np.array([len(one) for one in documents], np.int64), info, "uint16")
    assert [part.tolist() for part in np.split(made.tokens, np.cumsum(made.lengths)[:-1])] == (wanted or [[]])
    assert (made.bos_added, made.eos_added, made.empty) == (bos_added, eos_added, empty)


@given(lengths=st.lists(st.integers(0, 9)), most=st.integers(1, 12))
def test_cut_covers_every_document_once_within_the_bound(lengths, most):
    ranges = list(document_ranges(np.array(lengths, np.int64), most))
    assert [i for first, last in ranges for i in range(first, last)] == list(range(len(lengths)))
    for first, last in ranges:
        assert last == first + 1 or sum(lengths[first:last]) <= most
