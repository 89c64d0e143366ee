"""The name of a checkpoint."""

import pytest

from minimind_train.run_folder.options import SaveOptions, parse_step


@pytest.mark.parametrize(("text", "choice"), [("best", "best"), ("0", 0), ("1000", 1000), ("0070", 70)])
def test_a_checkpoint_is_named_by_its_step_or_as_the_best(text, choice):
    assert parse_step(text) == choice


@pytest.mark.parametrize("text", ["", "newest", "Best", "-1", "+1", "1.0", "1e3", "1_000", " 1", "٣", "²"])
def test_anything_else_names_no_checkpoint(text):
    with pytest.raises(ValueError, match="names no checkpoint"):
        parse_step(text)


def test_what_is_saved_where_nothing_is_asked_for():
    assert SaveOptions() == SaveOptions(save_every=1000, keep=3, keep_every=0, save_best=False)


def test_limits_of_saving():
    for value in (0, 10**12):
        options = SaveOptions(save_every=value, keep=value, keep_every=value)
        assert (options.save_every, options.keep, options.keep_every) == (value, value, value)
    for name in ("save_every", "keep", "keep_every"):
        for value in (-1, 10**12 + 1):
            with pytest.raises(ValueError, match=f"`{name}`"):
                SaveOptions(**{name: value})
