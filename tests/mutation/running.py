"""The nearest tests of a package, run in a copy of the project against one mutant after the other.

Most mutants differ inside of functions. For these one process imports all modules and collects all tests, and forks a child for each mutant, which
puts the changed code into the functions and runs the tests that run the changed lines: tenths of a second each. A mutant of another kind, and one
that these tests let live, is written to its file and meets all tests in a process that imports everything anew: first those that run the
changed lines, then those that run others of the module.
"""

import contextlib
import gc
import inspect
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType

import pytest

from tests.mutation.mutants import Mutant

_COPIED = ("minimind_data", "minimind_train", "cli", "tests", "data", "docs", "pyproject.toml")
_MOST_BYTES = 64 * 2**30
"""Of address space: a mutant that fills the memory is ended before the machine is."""
_MOST_TESTS = 300
"""A line that more tests run is tried with the quickest of them."""


def copy_project(root: Path, to: Path) -> None:
    """Copy what the tests need to a folder, from which they then import: nothing of the project itself is ever changed."""
    unneeded = shutil.ignore_patterns("__pycache__", "*.partial")
    for name in _COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, to / name, ignore=unneeded)
        else:
            shutil.copy(root / name, to / name)
    (to / "minimind_cli").symlink_to("cli")


@dataclass(frozen=True)
class Coverage:
    """How long each test takes, in seconds, and by file and line which ones run it."""

    seconds: Mapping[str, float]
    tests: Mapping[str, Mapping[int, set[str]]]

    def of(self, path: str, mutant: Mutant) -> list[str]:
        """The tests that run a line of a mutant, quickest first."""
        lines = self.tests.get(path, {})
        names = set().union(*(lines.get(line, ()) for line in range(mutant.line, mutant.last_line + 1)))
        return self._quickest_first(names)[:_MOST_TESTS]

    def of_module(self, path: str) -> list[str]:
        """The tests that run a line of a module, quickest first."""
        return self._quickest_first(set().union(*self.tests.get(path, {}).values()))

    def _quickest_first(self, names: set[str]) -> list[str]:
        return sorted(names, key=lambda name: (self.seconds[name], name))


class Tests:
    """The nearest tests of a package.

    Args:
        copy: of the project; its files are changed and changed back.
        nearest: files and folders of tests.
    """

    def __init__(self, copy: Path, nearest: Sequence[str]) -> None:
        self._copy = copy
        self._nearest = list(nearest)
        self._log = copy / ".log"
        self._timeout = 3600.0

    def survivors(self, mutants: Sequence[tuple[str, Mutant]]) -> Iterator[tuple[str, Mutant]]:
        """Yield those of the mutants (path, mutant) that all tests pass with.

        Raises:
            RuntimeError: the tests fail as they are, so that they can say nothing of mutants.
        """
        began = time.monotonic()
        if not self._pass_in_order([]):  # with compiled files written, which the others read
            raise RuntimeError(
                f"the tests of {', '.join(self._nearest)} fail as they are:\n{self._log.read_text()}"
            )
        self._timeout = 60 + 4 * (time.monotonic() - began)
        found = self._copy / ".found.json"
        found.unlink(missing_ok=True)
        collected = _Collected(self._copy, mutants, found)
        forked(lambda: self._main(self._nearest, [collected]), self._log, timeout=10**6)
        if not found.exists():
            raise RuntimeError(f"the tests could not be run in one process:\n{self._log.read_text()}")
        for index, names in json.loads(found.read_bytes()):
            path, mutant = mutants[index]
            with _mutated(self._copy / path, mutant.source):
                passes = self._pass_in_order(names)
            if passes:
                yield path, mutant

    def _pass_in_order(self, names: Sequence[str]) -> bool:
        """Whether the tests pass in a process that imports everything anew, those of these names before the others."""

        def work() -> int:
            return self._main(self._nearest, [Ordered(names)])

        return forked(work, self._log, timeout=self._timeout) == 0

    def _main(self, names: Sequence[str], plugins: list) -> int:
        """Run pytest in this process, which is one of its own."""
        resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))
        os.chdir(self._copy)
        os.environ["PYTHONPATH"] = str(self._copy)
        sys.path[:0] = [str(self._copy)]
        scratch = self._copy / ".scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        options = ["-x", "-q", "-s", "-p", "no:cacheprovider", "--hypothesis-seed=0", f"--basetemp={scratch}"]
        options += ["-m", "not slow and not distributed and not gpu"]
        return int(pytest.main([*options, *names], plugins=plugins))


class Ordered:
    """A plugin that has the tests of some names run before all others, in the order of these names."""

    def __init__(self, names: Sequence[str]) -> None:
        self._ranks = {name: rank for rank, name in enumerate(names)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self._ranks.get(item.nodeid, len(self._ranks)))


class _Collected:
    """A plugin that, in place of running the tests that were collected, runs some of them for each mutant, each time in a child.

    Into a file it writes what is still to be decided: pairs of a mutant's number and the names of the tests to begin with.
    """

    def __init__(self, copy: Path, mutants: Sequence[tuple[str, Mutant]], found: Path) -> None:
        self._copy = copy
        self._mutants = mutants
        self._found = found

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        coverage = self._trace(session)
        functions = defaultdict(list)
        files = {str(self._copy / path) for path, _ in self._mutants}
        for value in gc.get_objects():
            if type(value) is FunctionType and value.__code__.co_filename in files:
                functions[value.__code__.co_filename].append(value)
        undecided, starter = [], os.getppid()
        for index, (path, mutant) in enumerate(self._mutants):
            if os.getppid() != starter:  # nobody waits for the rest
                break
            names = coverage.of(path, mutant)
            file = self._copy / path
            codes = changed_codes(file.read_text("utf-8"), mutant.source, str(file))
            if not (
                names
                and codes
                and self._kill(
                    session, [items[name] for name in names], functions[str(file)], codes, coverage
                )
            ):
                undecided.append((index, list(dict.fromkeys([*names, *coverage.of_module(path)]))))
        self._found.write_text(json.dumps(undecided))
        return True

    def _kill(self, session, items, functions, codes, coverage) -> bool:
        """Whether one of these tests fails with this code."""

        def work() -> int:
            for function in functions:
                function.__code__ = codes.get(_key(function.__code__), function.__code__)
            return _run_items(session, items)

        # Of runs whose lines were noted, which took several times as long.
        seconds = sum(coverage.seconds[item.nodeid] for item in items)
        return forked(work, self._copy / ".log", timeout=10 + seconds) != 0

    def _trace(self, session: pytest.Session) -> Coverage:
        """Run all tests once, in a child too, which leaves this process as it was, and note the lines that each of them runs."""
        to = self._copy / ".coverage.json"

        def work() -> int:
            tracer = Tracer({str(self._copy / path) for path, _ in self._mutants})
            session.config.pluginmanager.register(tracer)
            status = _run_items(session, session.items)
            lines = {name: sorted(lines) for name, lines in tracer.lines.items()}
            to.write_text(json.dumps({"lines": lines, "seconds": tracer.seconds}))
            return status

        if forked(work, self._copy / ".log", timeout=3600) != 0:
            raise RuntimeError("the tests fail when their lines are noted")
        record = json.loads(to.read_bytes())
        tests = defaultdict(lambda: defaultdict(set))
        for name, lines in record["lines"].items():
            for file, line in lines:
                tests[str(Path(file).relative_to(self._copy))][line].add(name)
        return Coverage(record["seconds"], tests)


class Tracer:
    """A plugin that notes the lines of some files which a test runs, those of the fixtures that it uses included.

    Attributes:
        lines: by test, (file, line).
        seconds: by test.
    """

    def __init__(self, files: set[str]) -> None:
        self._files = files
        self._of_fixture = defaultdict(set)
        self._running = [set()]
        self.lines = {}
        self.seconds = {}

    def _trace(self, frame, event, argument):
        if frame.f_code.co_filename not in self._files:
            return None
        self._running[-1].add((frame.f_code.co_filename, frame.f_lineno))
        return self._trace

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        self._running.append(set())
        threading.settrace(self._trace)
        sys.settrace(self._trace)
        began = time.monotonic()
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)
            self.seconds[item.nodeid] = time.monotonic() - began
            lines = self._running.pop()
            for definitions in item._fixtureinfo.name2fixturedefs.values():
                for definition in definitions:
                    lines |= self._of_fixture[definition]
            self.lines[item.nodeid] = lines

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        self._running.append(set())
        try:
            return (yield)
        finally:
            lines = self._running.pop()
            self._of_fixture[fixturedef] |= lines
            self._running[-1] |= lines


def changed_codes(source: str, mutated: str, file: str) -> dict[tuple[str, int], CodeType]:
    """The code of the functions of a mutant, by name and first line of the original's; nothing where more than functions differs."""
    codes = {}
    for old, new in zip(_codes(source, file), _codes(mutated, file), strict=False):
        if old.co_qualname != new.co_qualname or old.co_freevars != new.co_freevars:
            return {}
        if not old.co_flags & inspect.CO_OPTIMIZED:  # a module or a class, which has run when it was imported
            if _own(old) != _own(new):
                return {}
        elif old != new:
            codes[_key(old)] = new
    return codes


def _codes(source: str, file: str) -> Iterator[CodeType]:
    """The code of a module and of all that is in it."""
    waiting = [compile(source, file, "exec", dont_inherit=True)]
    while waiting:
        code = waiting.pop()
        yield code
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _own(code: CodeType) -> tuple[bytes, str, tuple[str, ...]]:
    """What code does, but for the functions that it defines."""
    constants = [None if isinstance(constant, CodeType) else constant for constant in code.co_consts]
    return code.co_code, repr(constants), code.co_names


def _key(code: CodeType) -> tuple[str, int]:
    return code.co_qualname, code.co_firstlineno


def _run_items(session: pytest.Session, items: Sequence[pytest.Item]) -> int:
    """Run tests until one fails; return 1 then, or else 0."""
    for item, following in zip(items, [*items[1:], None], strict=True):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed:
            return 1
    return 0


def forked(work: Callable[[], int], log: Path, *, timeout: float) -> int | None:
    """Work in a child; return its exit status, None if it took too long. What it has started ends with it, and it with us."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.setsid()
            opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            nothing = os.open(os.devnull, os.O_RDONLY)
            for source, target in ((nothing, 0), (opened, 1), (opened, 2)):
                os.dup2(source, target)
            status = work()
        except BaseException:  # noqa: BLE001 - the log says it
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)
    ended, status = 0, 0
    try:
        ended, status = _waited(child, timeout)
    except BaseException:  # an interrupted child ends its own children, which are no longer of its group
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)
        with contextlib.suppress(ChildProcessError):
            ended, status = _waited(child, 10)
        raise
    finally:
        _end_group(child, reap=not ended)
    return os.waitstatus_to_exitcode(status) if ended else None


def _waited(child: int, timeout: float) -> tuple[int, int]:
    """Return what `os.waitpid` does, (0, 0) if the child has not ended in time."""
    deadline = time.monotonic() + timeout
    pause, ended, status = 0.001, 0, 0
    while not ended and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
        ended, status = os.waitpid(child, os.WNOHANG)
    return ended, status


def _end_group(child: int, *, reap: bool) -> None:
    """End a child and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if reap:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


@contextlib.contextmanager
def _mutated(file: Path, source: str) -> Iterator[None]:
    """A file of the copy with a mutant's source, and nothing compiled that says otherwise."""
    original = file.read_text("utf-8")
    for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*"):
        compiled.unlink()
    file.write_text(source, "utf-8")
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        file.write_text(original, "utf-8")
        os.environ["PYTHONDONTWRITEBYTECODE"] = ""
        sys.dont_write_bytecode = False
