"""Hashes decide what is on disk and in which order samples come, so their values are pinned."""

import numpy as np
import pytest

from minimind_data.hashing import belongs_to_share, hash_text, mix

GOLDEN = {
    ("", b""): 13020603013274838756,
    ("blocks/7", b""): 10999962429681392436,
    ("你好", b"validation"): 9804961339745262175,
    ("a text", b"empty think"): 4906132498165123966,
}


@pytest.mark.parametrize(("key", "value"), GOLDEN.items())
def test_hashes_of_texts_are_pinned(key, value):
    assert hash_text(*key) == value


def test_hashes_of_numbers_are_pinned():
    numbers = np.array([0, 1, 2**64 - 1], np.uint64)
    assert mix(numbers).tolist() == [0, 6238072747940578789, 13029008266876403067]
    assert numbers.tolist() == [0, 1, 2**64 - 1]


def test_a_share_has_its_part_of_the_texts_and_a_greater_one_has_them_too():
    texts = [f"text {number}" for number in range(4000)]
    shares = [{text for text in texts if belongs_to_share(text, share, b"x")} for share in (0, 0.1, 0.5, 1)]
    assert not shares[0]
    assert abs(len(shares[1]) - 400) < 100
    assert abs(len(shares[2]) - 2000) < 160
    assert len(shares[3]) == 4000
    assert shares[1] < shares[2]
    others = {text for text in texts if belongs_to_share(text, 0.5, b"y")}
    assert abs(len(shares[2] & others) - 1000) < 130
