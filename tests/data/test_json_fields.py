"""What JSON may say of a dataclass: the types of its fields and what their annotations add, each refusal by the name of the field."""

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from minimind_data.json_fields import (
    BESIDE,
    MAX_COUNT,
    Count,
    Digest,
    FieldError,
    FileName,
    FiniteJson,
    Key,
    as_file_name,
    is_file_name,
    read_fields,
)


@dataclass(frozen=True, kw_only=True)
class Size:
    width: Count
    height: Count = 7


@dataclass(frozen=True, kw_only=True)
class Picture:
    name: FileName
    size: Annotated[Size, BESIDE]
    sha256: Digest | None = None
    kind: Literal["oil", "ink"] = "oil"
    price: float = 1.0
    is_sold: Annotated[bool, Key("sold")] = False
    frames: tuple[Size, ...] = ()
    notes: dict[str, FiniteJson] | None = None


def test_what_fits_is_read_as_it_is():
    content = {
        "name": "蒙娜 丽莎.png", "width": 3, "sha256": "0" * 64, "kind": "ink", "price": 2, "sold": True,
        "frames": [{"width": 1, "height": 2}], "notes": {"a": [1.5, None, {"b": "c"}]},
    }  # fmt: skip
    assert read_fields(Picture, content) == Picture(
        name="蒙娜 丽莎.png",
        size=Size(width=3),
        sha256="0" * 64,
        kind="ink",
        price=2,
        is_sold=True,
        frames=(Size(width=1, height=2),),
        notes={"a": [1.5, None, {"b": "c"}]},
    )
    assert content["width"] == 3


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        ({"name": 3}, "name is 3, where a text is wanted"),
        ({"name": "a/b"}, "name is 'a/b', where the name of a file in the folder"),
        ({"width": True}, "width is true, where a whole number is wanted"),
        ({"width": 1.0}, "width is 1.0, where a whole number is wanted"),
        ({"width": -1}, "width is -1, where a whole number from 0 to"),
        ({"width": MAX_COUNT + 1}, "where a whole number from 0 to 9,007,199,254,740,991 is wanted"),
        ({"height": None}, "height is null, where"),
        ({"sha256": "abc"}, "sha256 is 'abc', where a SHA-256"),
        ({"kind": "chalk"}, "kind is 'chalk', where oil or ink is wanted"),
        ({"kind": []}, "kind is a list, where oil or ink is wanted"),
        ({"price": float("nan")}, "price is nan, where a number is wanted"),
        ({"sold": 1}, "sold is 1, where true or false is wanted"),
        ({"frames": {}}, "frames is an object, where a list is wanted"),
        ({"frames": [{"width": 1}, {"width": "x"}]}, r"frames\[1\].width is 'x', where"),
        ({"frames": [{}]}, r"frames\[0\].width is missing"),
        ({"frames": [{"width": 1, "depth": 2}]}, r"frames\[0\] has 'depth', which is no field"),
        (
            {"notes": {"a": [float("inf")]}},
            r"notes\['a'\] is a list, where a value of finite numbers is wanted",
        ),
        ({"is_sold": True}, "'is_sold' is no field that is known"),
        ({"size": {"width": 1}}, "'size' is no field that is known"),
    ],
)
def test_what_does_not_fit_is_named(change, clause):
    with pytest.raises(FieldError, match=clause):
        read_fields(Picture, {"name": "a.png", "width": 3, **change})


def test_what_is_missing_is_named_and_what_is_no_object_too():
    with pytest.raises(FieldError, match="width is missing"):
        read_fields(Picture, {"name": "a.png"})
    with pytest.raises(FieldError, match="a list stands where an object is wanted"):
        read_fields(Picture, [])


def test_unknown_keys_are_left_out_where_that_is_asked_for():
    content = {"width": 3, "depth": 4}
    assert read_fields(Size, content, ignore_unknown=True) == Size(width=3)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/a", "a\\b", "a\nb", "a\0", "\x7f", "x" * 251, "\ud800"]
)
def test_what_is_no_name_of_a_file(name):
    assert not is_file_name(name)


@pytest.mark.parametrize("name", ["a", "...", "a..b", "..a", " ", "数据-00000", "x" * 250, "\udc80"])
def test_what_is_the_name_of_a_file(name):
    assert is_file_name(name)


def test_a_text_becomes_the_name_of_a_file():
    assert as_file_name("a\tb\\c/数据") == "a_b_c_数据"
