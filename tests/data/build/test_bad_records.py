"""A build that sets bad records aside goes on only while they are few, whatever the workers and whatever happened on the way."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest

from minimind_data.build.bad_records import BadShare, are_too_many
from minimind_data.build.pipeline import commit, tokenize
from minimind_data.dataset.verification import verify
from minimind_data.errors import UserError
from tests.helpers.builds import options, tree
from tests.helpers.commands import mm_data

GOOD = {"text": "a text of some words"}
BAD = {"body": "a text of some words"}


def write(path: Path, *runs: tuple[dict, int]) -> Path:
    """Write each record so many times, numbered so that no two are the same."""
    records = [{**record, "number": i} for number, (record, count) in enumerate(runs) for i in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def aside(out, **changes):
    return options(out, on_bad_record="set-aside", **changes)


class Counts(NamedTuple):
    num_bad: int
    num_records: int


def test_a_share_is_told_of_enough_records_or_of_all():
    assert not are_too_many(999, 999, 0.5)
    assert are_too_many(999, 1000, 0.5)
    assert not are_too_many(500, 1000, 0.5)
    assert are_too_many(501, 1000, 0.5)
    assert not are_too_many(1000, 1000, 1.0, is_all=True)
    assert not are_too_many(19, 19, 0.5, is_all=True)
    assert are_too_many(11, 20, 0.5, is_all=True)
    assert not are_too_many(10, 20, 0.5, is_all=True)


def test_splits_count_in_the_order_of_the_dataset_whenever_they_are_made():
    made = {"a": Counts(400, 900), "b": Counts(600, 900), "c": Counts(0, 900), "d": Counts(900, 900)}
    in_order = BadShare(list(made), 0.5)
    assert [in_order.problem(dict(list(made.items())[:count])) for count in range(1, 3)] == [
        None,
        (1000, 1800),
    ]
    other = BadShare(list(made), 0.5)
    assert other.problem({name: made[name] for name in "bcd"}) is None
    assert other.problem(made) == (1000, 1800)
    fine = BadShare(["c", "d"], 0.5)
    assert fine.problem({"c": made["c"]}) is None
    assert fine.problem(made) is None


@pytest.mark.parametrize("workers", [1, 12])
@pytest.mark.parametrize("dedup", ["none", "exact"])
def test_a_build_of_bad_records_stops_and_loses_nothing(tmp_path, workers, dedup):
    source = write(tmp_path / "x.jsonl", (GOOD, 20), (BAD, 3000), (GOOD, 100))
    out = tmp_path / "out"
    match = r"x\.jsonl:21: .* of the first .* records are bad, too many .*: no field 'text' .*`?-?-?max.bad.share`? 1"
    messages = set()
    for _ in range(2):
        with pytest.raises(UserError, match=match) as caught:
            tokenize([source], aside(out, workers=workers, dedup=dedup))
        messages.add(str(caught.value))
        assert caught.value.option == "max_bad_share"
        assert not (out / "manifest.json").exists()
    with pytest.raises(UserError) as caught:
        tokenize([source], aside(tmp_path / "anew", workers=1, dedup=dedup))
    assert str(caught.value) in messages
    whole = tokenize([source], aside(out, workers=workers, dedup=dedup, max_bad_share=1.0))
    assert (whole.manifest.set_aside, whole.manifest.num_documents + whole.manifest.duplicates) == (3000, 120)
    tokenize([source], aside(tmp_path / "other", dedup=dedup, max_bad_share=0.999))
    assert tree(out) == tree(tmp_path / "other")
    assert not verify(out).problems


def test_a_large_split_of_bad_records_stops_before_its_end(tmp_path):
    source = write(tmp_path / "x.jsonl", (BAD, 200_000))
    with pytest.raises(UserError, match=r"x\.jsonl:1: ([\d,]+) of the first \1 records are bad") as caught:
        tokenize([source], aside(tmp_path / "out", split_bytes=2**30))
    assert "200,000" not in str(caught.value)


def test_a_build_that_was_stopped_goes_on_where_its_records_are_mended(tmp_path):
    source = write(tmp_path / "x.jsonl", (BAD, 30), (GOOD, 20))
    with pytest.raises(UserError, match=r"x\.jsonl:1: 30 of the first 50 records are bad"):
        tokenize([source], aside(tmp_path / "out"))
    write(source, (GOOD, 30), (BAD, 20))
    assert tokenize([source], aside(tmp_path / "out")).manifest.set_aside == 20


def test_of_few_records_any_may_be_bad_but_not_all(tmp_path):
    source = write(tmp_path / "x.jsonl", (BAD, 18), (GOOD, 1))
    assert tokenize([source], aside(tmp_path / "out")).manifest.set_aside == 18
    source = write(tmp_path / "y.jsonl", (BAD, 2))
    with pytest.raises(UserError, match=r"y\.jsonl:1: 2 of the first 2 records are bad.*no field 'text'"):
        tokenize([source], aside(tmp_path / "none", max_bad_share=1.0))


def test_a_dataset_with_many_bad_records_may_grow(tmp_path):
    first = write(tmp_path / "a.jsonl", (BAD, 60), (GOOD, 20))
    out = tmp_path / "out"
    tokenize([first], aside(out, max_bad_share=1.0))
    more = write(tmp_path / "b.jsonl", (GOOD, 30))
    assert tokenize([first, more], aside(out)).manifest.set_aside == 60


def test_slices_stop_for_themselves_and_join_with_what_they_set_aside(tmp_path):
    source = write(tmp_path / "x.jsonl", (GOOD, 900), (BAD, 90))
    out = tmp_path / "out"
    tokenize([source], aside(tmp_path / "whole", split_bytes=2048))
    for number in (1, 2):
        tokenize([source], aside(out, task=(number, 2), split_bytes=2048))
    assert commit(out).manifest.set_aside == 90
    assert tree(out) == tree(tmp_path / "whole")
    bad = write(tmp_path / "bad.jsonl", (BAD, 200))
    with pytest.raises(UserError, match="records are bad, too many"):
        tokenize([bad], aside(tmp_path / "sliced", task=(1, 2), split_bytes=2048))


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"text": ["a", "list"]}, "pretrain"),
        ({"text": 3}, "pretrain"),
        ({"body": "a"}, "pretrain"),
        ([], "pretrain"),
        ({"conversations": "words"}, "sft"),
        ({"text": "a"}, "sft"),
    ],
)
def test_setting_aside_is_not_advised_where_the_first_record_is_of_another_shape(tmp_path, record, kind):
    source = tmp_path / "x.jsonl"
    source.write_text(json.dumps(record) + "\n")
    result = mm_data("tokenize", source, "--out", tmp_path / "out", "--kind", kind)
    assert result.exit_code == 1
    assert "x.jsonl:1: " in result.stderr
    assert "set-aside" not in result.stderr


def test_setting_aside_is_advised_where_the_first_text_is_null(tmp_path):
    source = write(tmp_path / "x.jsonl", ({"text": None}, 1), (GOOD, 3))
    with pytest.raises(UserError, match="field 'text' is null, .*`on_bad_record` set-aside"):
        tokenize([source], options(tmp_path / "out"))


def test_the_share_is_a_number_from_0_to_1(tmp_path):
    source = write(tmp_path / "x.jsonl", (BAD, 60), (GOOD, 40))
    command = [
        "tokenize",
        source,
        "--out",
        tmp_path / "out",
        "--on-bad-record",
        "set-aside",
        "--max-bad-share",
    ]
    for share in ("-0.1", "1.1", "half"):
        assert mm_data(*command, share).exit_code == 2
    result = mm_data(*command, "0.59")
    assert result.exit_code == 1
    assert "or pass --max-bad-share 1, which leaves them out all the same" in result.stderr
    assert mm_data(*command, "0.6").exit_code == 0


def test_a_build_that_stops_leaves_no_thread(tmp_path):
    source = write(tmp_path / "x.jsonl", (GOOD, 10), (BAD, 200_000))
    before = threading.active_count()
    with pytest.raises(UserError, match="no field 'text'") as caught:
        tokenize([source], options(tmp_path / "out", split_bytes=2**30))
    assert caught.value.__traceback__ is not None  # which holds all that was at work
    assert threading.active_count() == before


MANY = """
import resource, sys
from pathlib import Path
from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions

def build(out, source):
    options = TokenizeOptions(out=Path(out), workers=1, backend="tokenizers", on_bad_record="set-aside", max_bad_share=1.0)
    return tokenize([source], options).manifest.set_aside

few, many, out = sys.argv[1:]
build(f"{out}-few", few)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(build(out, many))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_many_bad_records_take_little_memory(tmp_path):
    few, many = tmp_path / "few.jsonl", tmp_path / "many.jsonl"
    for path, count in ((few, 1), (many, 200)):
        with path.open("w") as file:
            file.write('{"text": "a"}\n')
            file.writelines([f"{'no JSON ' * 2**17}\n"] * count)
    command = [sys.executable, "-c", MANY, few, many, tmp_path / "out"]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    assert child.stdout.split()[0] == "200"
    assert (tmp_path / "out" / "set-aside.jsonl").stat().st_size > 200 * 2**20
    assert int(child.stdout.split()[1]) < 150
