"""The datasets of a run: one, or several as the parts of a mixture, whose windows are one list."""

from fractions import Fraction

import numpy as np
import pytest

from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.windows.opening import open_windows
from minimind_train.batches.datasets import Datasets, shown_weights
from minimind_train.batches.mixed_windows import MixedWindows
from minimind_train.batches.options import DataOptions, read_sources
from minimind_train.batches.positions import epochs_of, mixture_lines, window_at
from minimind_train.order.mixture import MixtureOrder, MixtureStage
from minimind_train.order.sample_order import SampleOrder
from tests.helpers.datasets import BOS, EOS, retokenized, text_dataset, write_dataset
from tests.helpers.runs import Said


@pytest.fixture(scope="module")
def parts(small_dataset, other_dataset):
    """Two words for --shards: parts a and b, three windows of a to one of b."""
    return (f"a={small_dataset}:0.75", f"b={other_dataset}:0.25")


def test_one_dataset_is_no_mixture(small_dataset):
    datasets = Datasets.open([str(small_dataset)])
    manifest = ShardSet.open(small_dataset).manifest
    assert (datasets.mixed, datasets.names, datasets.folder) == (False, ("",), small_dataset)
    assert (datasets.tokenizer, datasets.fingerprint) == (manifest.tokenizer, manifest.fingerprint)
    windows, order = datasets.windows_and_order(
        DataOptions(shards=str(small_dataset), seq_len=16, shuffle_block=3), seed=7, say=Said()
    )
    assert (windows.layout, windows.seq_len, windows.shards.folder) == ("concat", 16, small_dataset)
    assert order == SampleOrder(num_windows=len(windows), seed=7, kind="shuffled", block=3)


def test_a_mixture_is_its_parts_by_name(parts, small_dataset, other_dataset):
    datasets = Datasets.open(parts[::-1])
    one, other = (ShardSet.open(folder).manifest for folder in (small_dataset, other_dataset))
    assert (datasets.mixed, datasets.names, datasets.folder) == (True, ("a", "b"), small_dataset)
    assert [shards.folder for shards in datasets.sets] == [small_dataset, other_dataset]
    assert datasets.tokenizer == one.tokenizer
    assert datasets.fingerprint == f"a={one.fingerprint} b={other.fingerprint}"
    stages = (MixtureStage(start=0, shares=(1, 9), taken=(0, 0)),)
    options = DataOptions(
        shards=parts, seq_len=16, order="sequential", shuffle_block=3, mixture_stages=stages
    )
    windows, order = datasets.windows_and_order(options, seed=7, say=Said())
    assert windows.names == ("a", "b")
    sizes = {"a": len(windows.parts[0]), "b": len(windows.parts[1])}
    assert order == MixtureOrder.of(sizes, seed=7, kind="sequential", block=3, stages=stages)
    by_weights = datasets.order(windows, seed=7, kind="shuffled")
    stages = (MixtureStage(start=0, shares=(3, 1), taken=(0, 0)),)
    assert by_weights == MixtureOrder.of(sizes, seed=7, kind="shuffled", block=1, stages=stages)


def test_where_datasets_are_is_said_so_that_another_folder_can_use_it(parts, tmp_path, monkeypatch):
    folder = text_dataset(tmp_path / "here" / "data").resolve()
    monkeypatch.chdir(tmp_path / "here")
    assert Datasets.open(["data"]).resolved() == (str(folder),)
    assert Datasets.open(["b=data:1", "a=../here/data:0.5"]).resolved() == (
        f"a={folder}:1/2",
        f"b={folder}:1",
    )


def test_weights_are_shown_as_shares_of_all_of_them():
    assert shown_weights(read_sources(["zh=x:7", "en=y:3"])) == "en=0.3 zh=0.7"
    assert shown_weights(read_sources(["a=x:1", "b=y:2"])) == "a=0.333333 b=0.666667"


@pytest.mark.parametrize("same", [[], ["b"]], ids=["of two", "of three"])
def test_parts_of_different_tokenizers_are_refused_with_both_sides(tmp_path, small_dataset, same):
    other = retokenized(tmp_path / "other")
    with pytest.raises(UserError) as error:
        Datasets.open([f"{name}={small_dataset}:1" for name in ["a", *same]] + [f"c={other}:1"])
    for side in (small_dataset, other):
        assert f"{side} (" in str(error.value)
    assert "have different tokenizers, and the parts of a mixture share one" in str(error.value)


@pytest.mark.parametrize("apart", [False, True])
def test_windows_of_a_mixture_are_those_of_its_parts(apart, small_dataset, other_dataset):
    singles = [
        open_windows(ShardSet.open(d), layout="concat", seq_len=16, documents_apart=apart)
        for d in (small_dataset, other_dataset)
    ]
    mixed = MixedWindows(["a", "b"], singles)
    assert ("position_ids" in mixed.fetch(np.arange(2))) is apart
    assert len(mixed) == sum(map(len, singles))
    everything = mixed.fetch(np.arange(len(mixed)))
    for name, rows in everything.items():
        alone = [windows.fetch(np.arange(len(windows)))[name] for windows in singles]
        assert (rows == np.concatenate(alone)).all()
        assert rows.dtype == np.int64
        shuffled = np.random.default_rng(0).permutation(len(mixed))
        assert (mixed.fetch(shuffled)[name] == rows[shuffled]).all()
    assert mixed.fetch(np.array([], np.int64))["input_ids"].shape == (0, 16)
    shard, offset = singles[1].locate(3)
    assert mixed.locate(len(singles[0]) + 3) == (f"b/{shard}", offset)
    assert mixed.locate(len(singles[0])) == ("b/text-00000", 0)
    assert mixed.locate(len(singles[0]) - 1)[0] == "a/text-00001"
    for wrong in (-1, len(mixed)):
        with pytest.raises(IndexError, match=f"asked for, there are {len(mixed)}"):
            mixed.fetch(np.array([0, wrong]))


def test_a_mixture_asks_each_part_for_its_own_windows(small_dataset, other_dataset, monkeypatch):
    singles = [
        open_windows(ShardSet.open(d), layout="concat", seq_len=16) for d in (small_dataset, other_dataset)
    ]
    asked = {}
    for name, windows in zip("ab", singles, strict=True):
        monkeypatch.setattr(
            windows, "will_need", lambda numbers, name=name: asked.update({name: numbers.tolist()})
        )
    mixed, size = MixedWindows(["a", "b"], singles), len(singles[0])
    assert [shards.folder for shards in mixed.shard_sets] == [small_dataset, other_dataset]
    assert (mixed.seq_len, mixed.labels) == (16, False)
    assert repr(mixed) == f"MixedWindows(a={singles[0]!r}, b={singles[1]!r})"
    mixed.will_need(np.array([size, 3, size + 4, size - 1, 0]))
    assert asked == {"a": [3, size - 1, 0], "b": [0, 4]}
    asked.clear()
    mixed.will_need(np.array([size + 2]))
    assert asked == {"b": [2]}


@pytest.mark.parametrize("layout", ["concat", "pad", "pack"])
def test_weights_are_in_tokens_whatever_a_window_is(layout, tmp_path):
    short, long = text_dataset(tmp_path / "short"), text_dataset(tmp_path / "long", seed=3)
    datasets = Datasets.open([f"short={short}:1", f"long={long}:1"])
    options = {"layout": layout, "seq_len": 24 if layout != "pack" else 70}
    windows = datasets.windows(say=Said(), **options)
    shares = datasets.shares(windows)
    tokens = [
        Fraction(share * (len(part) * part.seq_len - part.padding), len(part))
        for share, part in zip(shares, windows.parts, strict=True)
    ]
    assert abs(tokens[0] / tokens[1] - 1) < Fraction(1, 1000)
    assert (shares == (1, 1)) is (layout == "concat")


def test_a_part_of_shorter_documents_gives_more_windows(tmp_path):
    # Of a document of n tokens a window of 8 has n inputs. So 2 windows of four documents of 2, 2, 4 and 4 have 6, and one of 6 has 6.
    for name, lengths in (("short", (2, 2, 4, 4)), ("long", (6, 6))):
        documents = [[BOS, *range(3, length + 1), EOS] for length in lengths]
        write_dataset(tmp_path / name, [documents])
    datasets = Datasets.open([f"short={tmp_path / 'short'}:2", f"long={tmp_path / 'long'}:1"])
    windows = datasets.windows(layout="pad", seq_len=8, say=Said())
    assert datasets.names == ("long", "short")
    assert datasets.shares(windows) == (1, 4)


def test_a_part_of_empty_documents_counts_as_one_token(tmp_path):
    write_dataset(tmp_path / "nothing", [[[]]])
    write_dataset(tmp_path / "some", [[[BOS, EOS]]])
    datasets = Datasets.open([f"a={tmp_path / 'nothing'}:1", f"b={tmp_path / 'some'}:1"])
    assert datasets.shares(datasets.windows(layout="pad", seq_len=8, say=Said())) == (2, 1)


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_window_at_says_where_a_window_lies(parts, order):
    datasets = Datasets.open(parts)
    windows = datasets.windows(layout="concat", seq_len=16, say=Said())
    ordered = datasets.order(windows, seed=42, kind=order)
    for position in (0, 1, 500, 10**9):
        told = window_at(ordered, windows, position)
        (window,) = ordered.windows(np.array([position]))
        assert windows.locate(int(window)) == (f"{told['part']}/{told['shard']}", told["offset"])


def test_what_stands_at_a_position_of_one_dataset(tmp_path):
    documents = [[BOS, *range(3, 3 + length), EOS] for length in (2, 3, 4)]  # of 4, 5 and 6 tokens
    shards = write_dataset(tmp_path / "data", [documents[:2], documents[2:]])
    windows = open_windows(shards, layout="pad", seq_len=8)
    order = SampleOrder(num_windows=3, kind="sequential")
    places = [window_at(order, windows, position) for position in (0, 1, 2, 7)]
    assert [tuple(place.items()) for place in places] == [
        (("epoch", epoch), ("window", window), ("shard", shard), ("offset", offset))
        for epoch, window, shard, offset in (
            (0, 0, "text-00000", 0),
            (0, 1, "text-00000", 4),
            (0, 2, "text-00001", 0),
            (2, 1, "text-00000", 4),
        )
    ]


def test_a_mixture_is_described_with_the_shares_that_hold_there():
    first = MixtureStage(start=0, shares=(1, 3), taken=(0, 0))
    order = MixtureOrder.of({"a": 4, "b": 1900}, seed=1, stages=[first]).reweighted(8, (1, 1))
    assert mixture_lines(order, 4, "a=0.25 b=0.75") == [
        "mixture of 2, wanted of the tokens: a=0.25 b=0.75; a pattern of 4 windows:",
        "  a: 1 of 4 windows (0.2500), 4 windows, 0.2500 epochs done",
        "  b: 3 of 4 windows (0.7500), 1,900 windows, 0.0016 epochs done",
    ]
    assert mixture_lines(order, 8, "it")[:2] == [
        "mixture of 2, wanted of the tokens: it; a pattern of 2 windows:",
        "  a: 1 of 2 windows (0.5000), 4 windows, 0.5000 epochs done",
    ]
    assert epochs_of(order, 28) == {"a": 3.0, "b": 0.0084}  # 2 + 10 windows of a, 6 + 10 of b
