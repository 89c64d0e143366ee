"""The name of a checkpoint."""

import pytest

from minimind_train.run_folder.options import parse_step


@pytest.mark.parametrize(("text", "choice"), [("best", "best"), ("0", 0), ("1000", 1000), ("0070", 70)])
def test_a_checkpoint_is_named_by_its_step_or_as_the_best(text, choice):
    assert parse_step(text) == choice


@pytest.mark.parametrize("text", ["", "newest", "Best", "-1", "+1", "1.0", "1e3", "1_000", " 1", "٣", "²"])
def test_anything_else_names_no_checkpoint(text):
    with pytest.raises(ValueError, match="names no checkpoint"):
        parse_step(text)
