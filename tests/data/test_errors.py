"""An error is a sentence, and its parts."""

import importlib
import pickle
import pkgutil
from pathlib import Path

import pytest

import minimind_data
import minimind_train
from minimind_data import errors
from minimind_data.errors import UserError


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({}, "no tokens"),
        ({"where": Path("a/b")}, "a/b: no tokens"),
        ({"remedy": "take more text"}, "no tokens; take more text"),
        ({"where": "a", "remedy": "take another `out`", "option": "out"}, "a: no tokens; take another `out`"),
    ],
)
def test_the_parts_make_one_sentence(parts, sentence):
    error = UserError("no tokens", **parts)
    assert str(error) == sentence
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == sentence
    assert vars(again) == vars(error)


def test_a_subclass_travels_whole():
    class OfAFolderError(UserError):
        def __init__(self, folder):
            super().__init__("is gone", where=folder, remedy="bring it back")

    error = OfAFolderError(Path("a/b"))
    rebuild, (kind, *rest) = error.__reduce__()
    again = rebuild(kind, *rest)
    assert (type(again), str(again), vars(again)) == (OfAFolderError, str(error), vars(error))


def test_the_hierarchy_is_drawn_whole():
    for package in (minimind_data, minimind_train):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name != "minimind_data.build.ray" and ".integrations." not in module.name:
                importlib.import_module(module.name)

    def drawn(kind, depth):
        yield depth, kind.__name__, None if kind is UserError else f"({kind.__module__})"
        for child in kind.__subclasses__():
            if child.__module__.startswith("minimind_"):
                yield from drawn(child, depth + 1)

    lines = [line for line in errors.__doc__.splitlines() if line.startswith("    ")]
    for depth, name, module in drawn(UserError, 0):
        (line,) = [line for line in lines if line.split()[0] == name]
        assert len(line) - len(line.lstrip()) == 4 + 2 * depth
        assert module is None or line.endswith(module)
    assert len(lines) == len(list(drawn(UserError, 0)))
