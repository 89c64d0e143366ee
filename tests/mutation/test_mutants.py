"""The mutants are the mistakes that they are said to be, and none that nobody could notice."""

import ast
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from types import SimpleNamespace

import pytest

from tests.mutation.__main__ import (
    EQUAL,
    NEAREST,
    ROOT,
    is_equal,
    main,
    modules_of,
    read_equal,
    sampled,
    scratch_folder,
)
from tests.mutation.mutants import mutants_of
from tests.mutation.running import Coverage, Ordered, changed_codes

SOURCE = '''
"""Text with 1 number."""
__all__ = ["f"]
Pair = tuple[int, int]


def f(n: int = 3, *, exact: bool = False) -> list[int]:
    """Nothing here is a mutant: 5 < 6."""
    if n < 0 and exact:
        raise ValueError(f"{n + 1} is below {2}")
    self.total -= len(rows[: n + 1])
    return [i for i in range(n) if i % 2]
'''


def test_each_mistake_is_made_once_and_text_and_types_are_left_alone():
    mutants = mutants_of(SOURCE)
    assert {(mutant.was, mutant.becomes) for mutant in mutants} == {
        (was, becomes)
        for was, changed in {
            "def f(n: int = 3, *, exact: bool = False) -> list[int]:": {
                "def f(n: int = 4, *, exact: bool = False) -> list[int]:",
                "def f(n: int = 2, *, exact: bool = False) -> list[int]:",
                "def f(n: int = 3, *, exact: bool = True) -> list[int]:",
            },
            "if n < 0 and exact:": {
                "if False:",
                "if True:",
                "if ((n < 0) or (exact)):",
                "if (n) <= (0) and exact:",
                "if (n) >= (0) and exact:",
                "if n < 1 and exact:",
                "if n < (-1) and exact:",
            },
            'raise ValueError(f"{n + 1} is below {2}")': {"pass"},
            "self.total -= len(rows[: n + 1])": {
                "pass",
                "self.total += len(rows[:n + 1])",
                "self.total -= len(rows[: (n + 1) + 1])",
                "self.total -= len(rows[: ((n) - (1))])",
                "self.total -= len(rows[: n + 2])",
                "self.total -= len(rows[: n + 0])",
            },
            "return [i for i in range(n) if i % 2]": {
                "return None",
                "return [i for i in range((n) + 1) if i % 2]",
                "return [i for i in range(n) if True]",
                "return [i for i in range(n) if ((i) // (2))]",
                "return [i for i in range(n) if i % 3]",
                "return [i for i in range(n) if i % 1]",
            },
        }.items()
        for becomes in changed
    }
    for mutant in mutants:
        ast.parse(mutant.source)
        assert SOURCE.splitlines()[mutant.line - 1].strip().startswith(mutant.was[:10])


def test_a_change_of_several_lines_is_one_mutant_and_characters_are_not_bytes():
    source = textwrap.dedent("""
        name = "北京", 1
        print(
            name,
        )
    """)
    assert [(mutant.was, mutant.becomes) for mutant in mutants_of(source)] == [
        ('name = "北京", 1', 'name = "北京", 2'),
        ('name = "北京", 1', 'name = "北京", 0'),
        ("print( name, )", "pass"),
    ]


def test_a_sample_is_the_same_every_time_and_all_is_all():
    mutants = [("a.py", mutant) for mutant in mutants_of(SOURCE)]
    assert sampled(mutants, 1, 0) == mutants
    assert sampled(mutants, 5, 3) == sampled(mutants, 5, 3)
    assert sampled(mutants, 5, 3) != sampled(mutants, 5, 4)
    many = [(f"{number}.py", mutant) for number in range(200) for _, mutant in mutants]
    assert abs(len(sampled(many, 5, 3)) - len(many) / 5) < 0.1 * len(many) / 5


def test_a_sample_stays_the_same_when_other_lines_change():
    def names(source, chosen):
        first = source.splitlines().index("def f(n: int = 3, *, exact: bool = False) -> list[int]:")
        return [
            (mutant.line - first, mutant.was, mutant.becomes) for _, mutant in chosen if mutant.line > first
        ]

    longer = SOURCE.replace("Pair =", "SIZE = 7 + 1\nPair =")
    for seed in range(20):
        before = sampled([("a.py", mutant) for mutant in mutants_of(SOURCE)], 3, seed)
        after = sampled([("a.py", mutant) for mutant in mutants_of(longer)], 3, seed)
        assert names(longer, after) == names(SOURCE, before)


def test_equal_lines_are_sampled_each_for_itself():
    source = "\n".join(["a = b < c"] * 400)
    mutants = [("a.py", mutant) for mutant in mutants_of(source)]
    assert 0 < len(sampled(mutants, 4, 0)) < len(mutants)


def test_the_packages_and_their_tests_exist_and_what_is_judged_equal_has_a_reason():
    assert [package for package, _ in modules_of([])] == list(NEAREST)
    assert all((ROOT / test).exists() for tests in NEAREST.values() for test in tests)
    assert all(read_equal(EQUAL.read_text("utf-8")).values())


def test_a_list_of_equal_mutants_is_read():
    text = "# a note\n\nfolder/a.py\n- if a < b:\n+ if a <= b:\nthey are never\nthe same\n"
    assert read_equal(text) == {("folder/a.py", "if a < b:", "if a <= b:"): "they are never the same"}


def test_a_line_of_which_every_mutant_is_equal_is_judged_once():
    first, *_, last = mutants_of("SIZE = 2 * 2**20\nn = 3")
    equal = read_equal("a.py\n- SIZE = 2 * 2**20\n+ *\nonly how much is read at a time")
    assert is_equal("a.py", first, equal)
    assert not is_equal("b.py", first, equal)
    assert not is_equal("a.py", last, equal)


@pytest.mark.parametrize("every", ["0", "-3", "few"])
def test_one_of_no_mutants_is_wrong_usage(every, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mutation", "--every", every])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "argument --every" in capsys.readouterr().err


def test_what_a_killed_run_left_is_removed_and_what_another_uses_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "mutants-left" / "project").mkdir(parents=True)
    (tmp_path / "else").mkdir()
    with scratch_folder() as one:
        (one / "file").touch()
        assert sorted(tmp_path.iterdir()) == [tmp_path / "else", one]
        with scratch_folder() as other:
            assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "else", one, other])
    assert list(tmp_path.iterdir()) == [tmp_path / "else"]


def test_an_interrupted_run_ends_the_tests_that_it_has_started(tmp_path):
    script = f"""
import os, signal, sys, time
from pathlib import Path
from tests.mutation.running import forked
signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
log = Path({str(tmp_path)!r}, "log")
def inner():
    Path({str(tmp_path)!r}, "pid.partial").write_text(str(os.getpid()))
    Path({str(tmp_path)!r}, "pid.partial").rename({str(tmp_path / "pid")!r})
    for _ in range(2000):
        time.sleep(0.05)  # a signal just before a long sleep would be handled after it
forked(lambda: forked(inner, log, timeout=100), log, timeout=100)
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_the_quickest_tests_of_a_line_come_first_and_none_is_left_out():
    coverage = Coverage(
        {"a": 3.0, "b": 1.0, "c": 2.0}, {"m.py": {1: {"a"}, 2: {"a", "c"}, 3: {"b"}}, "n.py": {1: {"b"}}}
    )
    assert coverage.of("m.py", SimpleNamespace(line=1, last_line=2)) == ["c", "a"]
    assert coverage.of("m.py", SimpleNamespace(line=4, last_line=4)) == []
    assert coverage.of_module("m.py") == ["b", "c", "a"]
    assert coverage.of_module("o.py") == []
    items = [SimpleNamespace(nodeid=name) for name in "xcayb"]
    Ordered(["b", "c"]).pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == ["b", "c", "x", "a", "y"]


def test_changed_functions_can_be_put_in_place_of_those_that_were_imported():
    source = "SIZE = 3\n\n\ndef outer(n=1):\n    print(\n        n\n    )\n    def inner():\n        return n + 1\n    return inner()\n\n\nclass A:\n    n = 5\n\n    def b(self):\n        return 2\n"
    changed = {
        (mutant.was, mutant.becomes): [name for name, _ in changed_codes(source, mutant.source, "a.py")]
        for mutant in mutants_of(source)
    }
    assert changed["SIZE = 3", "SIZE = 4"] == []
    assert changed["def outer(n=1):", "def outer(n=2):"] == []
    assert changed["n = 5", "n = 6"] == []
    assert changed["return 2", "return 3"] == ["A.b"]
    assert "outer.<locals>.inner" in changed["return n + 1", "return n + 2"]
    shorter = next(mutant for mutant in mutants_of(source) if mutant.was == "print( n )")
    codes = changed_codes(source, shorter.source, "a.py")
    assert ("A.b", 16) in codes, "by its old line"
    names = {}
    exec(compile(source, "a.py", "exec"), names)  # noqa: S102 - it stands above
    names["outer"].__code__ = codes["outer", 4]
    assert names["outer"](4) == 5
