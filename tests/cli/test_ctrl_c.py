"""Ctrl-C before a command begins, while it works, while that is said and while the program ends: one sentence at most, never a traceback."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import atexit, importlib, signal, sys
from minimind_cli import entry

def interrupt(*_, **__):
    signal.raise_signal(signal.SIGINT)

def interrupted(function):
    def call(*arguments, **options):
        interrupt()
        return function(*arguments, **options)
    return call

sys.argv = ["mm-data", "info", "nowhere"]
{deed}
entry.data()
"""
SAID = "error: interrupted\n"


def end_of(deed):
    """The exit status and the stderr of mm-data with something done before it begins."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(deed=deed)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr
    return result.returncode, result.stderr


@pytest.mark.parametrize(
    "deed",
    [
        "entry.importlib.import_module = interrupted(importlib.import_module)",
        "from minimind_cli import data; data.main = interrupted(data.main)",
        "from minimind_cli import options; options.TyperGroup.make_context = interrupted(options.TyperGroup.make_context)",
        "from minimind_cli import options; options._Command.parse_args = interrupted(options._Command.parse_args)",
        "from minimind_cli import options; options._Command.invoke = interrupted(options._Command.invoke)",
        "from minimind_cli import options; options.use_flags_of = interrupted(options.use_flags_of)",
        "from minimind_data.dataset.format import Manifest; Manifest.read = interrupt",
    ],
    ids=["import", "main", "program", "parsing", "invoking", "beginning", "working"],
)
def test_it_is_said_at_whatever_point_it_comes(deed):
    assert end_of(deed) == (128 + signal.SIGINT, SAID)


def test_where_a_library_makes_something_else_of_an_exception_it_is_said_too():
    """As the import of a C library may do."""
    deed = """
def import_module(name):
    try:
        interrupt()
    except KeyboardInterrupt:
        raise ImportError("numpy.core.multiarray failed to import")
entry.importlib.import_module = import_module
"""
    assert end_of(deed) == (128 + signal.SIGINT, SAID)


def test_a_second_one_while_the_first_is_said_ends_the_program_like_any_other():
    deed = """
from minimind_cli import options
options._Command.invoke = interrupted(options._Command.invoke)
options._fail = interrupted(options._fail)
"""
    assert end_of(deed) == (-signal.SIGINT, "")


def test_one_while_the_program_ends_shows_no_traceback():
    status, said = end_of("atexit.register(interrupt)")
    assert status == -signal.SIGINT
    assert said.startswith("error: nowhere: ")


def test_after_the_imports_it_is_an_exception_again():
    program = (
        "import signal\n"
        "from minimind_cli.entry import importing\n"
        "with importing():\n"
        "    import json\n"
        "try:\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "except KeyboardInterrupt:\n"
        "    print('an exception')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "an exception\n"
