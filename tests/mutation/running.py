"""The tests of one module, in a copy of the project and in processes that are forked from one with all libraries imported.

A first run notes which lines each test runs; a mutant then meets the tests that run its lines, quickest first, and what they let live meets all of
the nearest tests.
"""

import contextlib
import importlib
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
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

_COPIED = ("minimind_data", "minimind_train", "cli", "tests", "data", "docs", "pyproject.toml")
_MOST_BYTES = 64 * 2**30
"""Of address space: a mutant that fills the memory is ended before the machine is."""


def copy_project(root: Path, to: Path) -> None:
    """Copy what the tests need to a folder, from which they then import: nothing of the project itself is ever changed."""
    for name in _COPIED:
        if (root / name).is_dir():
            skipped = shutil.ignore_patterns("__pycache__", "*.bin", "*.idx") if name == "data" else None
            shutil.copytree(root / name, to / name, ignore=skipped or shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(root / name, to / name)
    (to / "minimind_cli").symlink_to("cli")


@dataclass(frozen=True)
class Coverage:
    """What the tests run: their seconds, and by file and line who runs it. Line 0 is any line of the file."""

    seconds: dict[str, float]
    tests: dict[str, dict[int, set[str]]]

    def of(self, path: str, first: int, last: int) -> list[str]:
        """The tests that run one of these lines, quickest first."""
        lines = self.tests.get(path, {})
        names = set().union(*(lines.get(line, ()) for line in range(first, last + 1)))
        return sorted(names, key=lambda name: (self.seconds[name], name))


class _Tracer:
    """A plugin that notes the lines of some files which a test runs, those of the fixtures that it uses included."""

    def __init__(self, files: Collection[str]) -> None:
        self._files = frozenset(files)
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


def _libraries() -> list[str]:
    """The modules of installed libraries that this process has imported, in the order of imports."""
    return [
        name
        for name, module in list(sys.modules.items())
        if "site-packages" in (getattr(module, "__file__", None) or "") and "pytest" not in name
    ]


class Tests:
    """The nearest tests of a module, run in a copy of the project."""

    def __init__(self, copy: Path, nearest: Sequence[str]) -> None:
        self._copy = copy
        self._nearest = list(nearest)
        self._timeout = 3600.0

    def trace(self, files: Sequence[str]) -> Coverage:
        """Run them unchanged, and return what they run of these files.

        Raises:
            RuntimeError: they fail, so that they can say nothing of mutants.
        """
        began = time.monotonic()
        if not self.pass_with(None):  # with compiled files written, which the others read
            raise RuntimeError(
                f"the tests of {', '.join(self._nearest)} fail as they are: {self._log.read_text()}"
            )
        self._timeout = 30 + 3 * (time.monotonic() - began)
        found = self._copy / ".coverage.json"
        self._fork(self._nearest, traced=[str(self._copy / file) for file in files], to=found, timeout=3600)
        record = json.loads(found.read_bytes())
        for name in record["libraries"]:  # so that no mutant waits for them
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        tests = defaultdict(lambda: defaultdict(set))
        for name, lines in record["lines"].items():
            for file, line in lines:
                path = str(Path(file).relative_to(self._copy))
                tests[path][line].add(name)
        return Coverage(record["seconds"], tests)

    def pass_with(self, names: Sequence[str] | None) -> bool:
        """Whether these tests pass, by default all of the nearest."""
        return self._fork(self._nearest if names is None else names, timeout=self._timeout) == 0

    @property
    def _log(self) -> Path:
        return self._copy / ".log"

    def _fork(
        self, names: Sequence[str], *, timeout: float, traced=None, to: Path | None = None
    ) -> int | None:
        """Run tests in a process of their own; return its exit status, None if it took too long."""
        child = os.fork()
        if child == 0:
            status = 70
            try:
                status = self._run(names, traced, to)
            except BaseException:  # noqa: BLE001 - the log says it
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        deadline = time.monotonic() + timeout
        ended = 0
        while not ended and time.monotonic() < deadline:
            time.sleep(0.02)
            ended, status = os.waitpid(child, os.WNOHANG)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what it has started, or all of it
        if not ended:
            os.waitpid(child, 0)
            return None
        return os.waitstatus_to_exitcode(status)

    def _run(self, names: Sequence[str], traced, to: Path | None) -> int:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.chdir(self._copy)
        os.environ["PYTHONPATH"] = str(self._copy)
        sys.path[:0] = [str(self._copy)]
        scratch = self._copy / ".scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", f"--basetemp={scratch}"]
        options += ["-m", "not slow and not distributed and not gpu"]
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of plugins that are imported already
        tracer = _Tracer(traced) if traced else None
        status = pytest.main([*options, *names], plugins=[tracer] if tracer else [])
        if tracer:
            lines = {name: sorted(lines) for name, lines in tracer.lines.items()}
            to.write_text(json.dumps({"lines": lines, "seconds": tracer.seconds, "libraries": _libraries()}))
        sys.stdout.flush()
        return int(status)
