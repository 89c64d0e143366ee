"""Forms: one table, whose row is all that the rest of the program knows of one."""

from collections import Counter
from typing import get_args

import pytest

from minimind_data.build.plan import TokenizeOptions
from minimind_data.inputs import discovery
from minimind_data.inputs.base import Form
from minimind_data.inputs.forms import FORMS, FormChoice, FormEntry
from minimind_data.inputs.spec import RecordSpec

LETTERS = FormEntry(
    title="letters",
    make=lambda *_: None,
    suffixes=(".letter",),
    likely_start=b"Dear",
    objection=lambda head: None if b"Yours" in head else "has no end; write one",
)


def test_a_suffix_and_a_magic_number_belong_to_one_form():
    assert max(Counter(suffix for entry in FORMS.values() for suffix in entry.suffixes).values()) == 1
    magics = [entry.magic for entry in FORMS.values() if entry.magic]
    assert not any(one != other and one.startswith(other) for one in magics for other in magics)


def test_every_form_can_be_chosen_and_made():
    assert get_args(FormChoice) == ("auto", *FORMS)
    for name, entry in FORMS.items():
        TokenizeOptions(format=name)
        assert isinstance(entry.make(RecordSpec(), "pretrain"), Form)
    with pytest.raises(ValueError, match="`format` must be auto, jsonl, parquet, text, not 'letters'"):
        TokenizeOptions(format="letters")


def test_a_row_is_all_that_detection_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(FORMS, "letters", LETTERS)
    monkeypatch.setitem(discovery._SUFFIXES, ".letter", "letters")
    (tmp_path / "a.letter").write_text("Hello. Yours")
    (tmp_path / "b").write_text("Dear all. Yours")
    (tmp_path / "c.letter").write_text("Hello.")
    for name in ("a.letter", "b"):
        assert discovery.source_of(str(tmp_path / name)).form == "letters"
    with pytest.raises(discovery.UserError, match="c.letter: has no end; write one"):
        discovery.source_of(str(tmp_path / "c.letter"))
