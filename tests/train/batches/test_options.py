"""What a run reads, as it is asked for: datasets, windows, their order."""

from fractions import Fraction
from pathlib import Path

import pytest

from minimind_train.batches.options import (
    DataOptions,
    OrderOptions,
    WindowOptions,
    read_sources,
    source_texts,
    window_options,
)
from minimind_train.order.mixture import MAX_PARTS


def test_words_for_datasets():
    assert [str(source) for source in read_sources(["data/zh"])] == ["data/zh"]
    both = read_sources(["zh=data/zh:0.7", "en=/x:y=z:3/10"])
    assert [(s.name, str(s.folder), s.weight) for s in both] == [
        ("en", "/x:y=z", Fraction(3, 10)),
        ("zh", "data/zh", Fraction(7, 10)),
    ]
    assert read_sources([str(source) for source in both]) == both


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["data/zh", "en=data/en:1"], "NAME=DIR:WEIGHT, such as zh=data/zh:0.7, not 'data/zh'"),
        (["z h=data:1"], "NAME=DIR:WEIGHT"),
        (["a=x:much"], "such as 0.7 or 1/3, not 'much'"),
        (["a=x:-1"], "not '-1'"),
        (["a=x:1/0"], "not '1/0'"),
        (["a=x:nan"], "not 'nan'"),
        (["a=x:1e13"], "not '1e13'"),
        (["a=x:1", "a=y:1"], "two parts are named a"),
        (["a=x:0", "b=y:0"], "every weight is 0"),
    ],
)
def test_words_that_name_no_datasets(words, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_sources(words)


def test_one_part_alone_is_a_mixture_and_a_folder_may_have_an_equals_sign():
    (part,) = read_sources(["zh=data/zh:2"])
    assert (part.name, part.folder, part.weight) == ("zh", Path("data/zh"), 2)
    (dataset,) = read_sources(["a=b"])
    assert (dataset.name, dataset.folder, dataset.weight) == ("", Path("a=b"), 1)


@pytest.mark.parametrize("weight", ["0", "1", "1e12", "1/1000000000000", "0.000000000001"])
def test_the_smallest_and_the_largest_weights(weight):
    both = read_sources([f"a=x:{weight}", "b=y:1"])
    assert both[0].weight == Fraction(weight)


@pytest.mark.parametrize("weight", ["-1e-12", "1000000000001", "1/1000000000001", "inf", "-1/2"])
def test_weights_beyond_them(weight):
    with pytest.raises(ValueError, match=f"not '{weight}'"):
        read_sources([f"a=x:{weight}", "b=y:1"])


def test_a_mixture_has_so_many_parts_and_no_more():
    texts = [f"p{number:03d}=x:1" for number in range(MAX_PARTS + 1)]
    assert len(read_sources(texts[1:])) == MAX_PARTS == 100
    with pytest.raises(ValueError, match="1 to 100 parts, not 101"):
        read_sources(texts)
    with pytest.raises(ValueError, match="1 to 100 parts, not 0"):
        read_sources([])


def test_one_dataset_may_be_a_string_or_a_path():
    assert source_texts("data") == source_texts(Path("data")) == source_texts(["data"]) == ("data",)
    assert DataOptions(shards="data").shards == ("data",)
    assert DataOptions(shards=["b=y:1", "a=x:1"]).shards == ("b=y:1", "a=x:1")


def test_what_is_read_where_nothing_is_asked_for():
    options = DataOptions()
    assert (options.shards, options.order, options.shuffle_block) == (("data",), "shuffled", 1)
    assert (options.skip_positions, options.resume_from, options.mixture_stages) == ((), None, ())
    assert window_options(options) == {
        "layout": "concat",
        "seq_len": 340,
        "long_documents": "cut",
        "documents_apart": False,
    }


@pytest.mark.parametrize(("mask", "apart"), [(None, False), (False, False), (True, True)])
def test_windows_are_opened_as_the_options_say(mask, apart):
    options = WindowOptions(layout="pack", long_documents="drop", document_mask=mask, seq_len=12)
    assert window_options(options) == {
        "layout": "pack",
        "seq_len": 12,
        "long_documents": "drop",
        "documents_apart": apart,
    }


def test_blocks_of_windows_and_lengths_have_limits():
    for block in (1, 2**40):
        assert OrderOptions(shuffle_block=block).shuffle_block == block
    for block in (0, 2**40 + 1):
        with pytest.raises(ValueError, match=f"`shuffle_block` must be from 1 to 2.40 windows, not {block}"):
            DataOptions(shuffle_block=block)
    assert DataOptions(seq_len=1).seq_len == 1
    with pytest.raises(ValueError, match="`seq_len` must be at least 1, not 0"):
        DataOptions(seq_len=0)


def test_datasets_that_cannot_be_read_are_refused_by_the_name_of_the_option():
    with pytest.raises(ValueError, match="^`shards`: every weight is 0"):
        DataOptions(shards=("a=x:0", "b=y:0"))


def test_positions_to_skip_are_put_together():
    assert DataOptions(skip_positions=("30:40", "5:7", "35:50")).skip_positions == ("5:7", "30:50")


def test_a_token_to_begin_at_is_a_shard_and_an_offset():
    for text in ("text-00000:4096", "a:b:0"):
        assert DataOptions(resume_from=text).resume_from == text
    for text in ("", "5", ":5", "text-00000", "text-00000:", "text-00000:-1", "text-00000:x"):
        with pytest.raises(ValueError, match="must be SHARD:OFFSET, such as text-00000:4096, not"):
            DataOptions(resume_from=text)
