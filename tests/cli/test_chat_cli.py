"""Talking through a pipe and in a terminal, as a user does."""

import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from tests.helpers.commands import TINY, mm_train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    (folder / "text.txt").write_text("one two three four five six seven\n" * 99)
    tokenize([folder / "text.txt"], TokenizeOptions(out=folder / "data", workers=1))
    result = mm_train("pretrain", "--shards", folder / "data", "--run", folder / "run", *TINY, "--steps", 1)
    assert result.exit_code == 0, result.stderr
    return folder / "run"


def chat(run, *more, **options):
    return mm_train("generate", "--run", run, "--chat", "--max-new-tokens", 4, *more, **options)


def test_a_line_is_a_turn_and_the_history_is_told(run):
    result = chat(run, input="Hello?\n\nAnd then?\n")
    assert result.exit_code == 0, result.stderr
    first, second = result.stdout.splitlines()[0], result.stdout.splitlines()[-1]
    assert chat(run, input="Hello?\n").stdout.splitlines()[0] == first
    assert chat(run, input="Hello?\n/clear\nAnd then?\n").stdout.splitlines()[-1] != second
    assert chat(run, "--prompt", "Hello?").stdout.splitlines()[0] == first
    assert chat(run, "--prompt", "Hello?", "--system", "Be kind.").stdout.splitlines()[0] != first


def test_a_line_that_is_no_text_is_told_by_its_number(run):
    result = chat(run, input=b"Hello?\n\xff\n")
    assert result.exit_code == 1
    assert "line 2 of standard input: this holds bytes that are no text" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "--prompt is missing, the text to continue; to chat"),
        (("--system", "x", "--prompt", "y"), "goes with --chat"),
    ],
)
def test_wrong_usage(run, arguments, complaint):
    result = mm_train("generate", "--run", run, *arguments)
    assert result.exit_code == 2
    assert complaint in " ".join(result.stderr.split())


class Terminal:
    """A process with a terminal, which is not its own: Ctrl-C has to come as a signal."""

    def __init__(self, *arguments):
        self.fd, child = pty.openpty()
        program = "from minimind_cli.entry import train; train()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            stdin=child, stdout=child, stderr=child,
        )  # fmt: skip
        os.close(child)
        self.shown = ""

    def wait_for(self, text, after=0):
        deadline = time.monotonic() + 120
        while text not in self.shown[after:]:
            assert time.monotonic() < deadline, self.shown
            if select.select([self.fd], [], [], 0.2)[0]:
                self.shown += os.read(self.fd, 4096).decode(errors="replace")
        return self.shown.index(text, after) + len(text)

    def type(self, data):
        os.write(self.fd, data)


@pytest.mark.slow
def test_in_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_leaves(run):
    terminal = Terminal("generate", "--run", run, "--chat", "--max-new-tokens", 30_000, "--device", "cpu")
    at = terminal.wait_for("> ")
    assert "Ctrl-C stops an answer, Ctrl-D or /exit leaves" in terminal.shown
    terminal.type(b"Hello?\n")
    at = terminal.wait_for("Hello?", at)
    terminal.wait_for(" ", at)
    terminal.process.send_signal(signal.SIGINT)
    at = terminal.wait_for(" …", at)
    at = terminal.wait_for("> ", at)
    terminal.type(b"/clear\n")
    at = terminal.wait_for("(a new conversation)", at)
    terminal.wait_for("> ", at)
    terminal.type(b"\x04")
    assert terminal.process.wait(60) == 0, terminal.shown


def test_tools_and_thinking_reach_the_model(run, tmp_path):
    tools = tmp_path / "tools.json"
    tools.write_text('[{"type": "function", "function": {"name": "weather"}}]')
    plain = chat(run, "--prompt", "Hello?").stdout
    for words in (("--tools", tools), ("--thinking",)):
        result = chat(run, "--prompt", "Hello?", *words)
        assert result.exit_code == 0, result.stderr
        assert result.stdout != plain
    assert chat(run, "--prompt", "Hello?", "--no-thinking").stdout == plain


def test_a_file_that_holds_no_tools_is_named(run, tmp_path):
    (tmp_path / "tools.json").write_text("{}")
    result = chat(run, "--prompt", "Hello?", "--tools", tmp_path / "tools.json")
    assert result.exit_code == 1
    assert "function 1 has no name" in result.stderr


@pytest.mark.parametrize("words", [("--thinking",), ("--no-thinking",), ("--tools", "tools.json")])
def test_what_is_for_chats_goes_with_chat(run, words):
    result = mm_train("generate", "--run", run, "--prompt", "y", *words)
    assert result.exit_code == 2
    assert "goes with --chat" in " ".join(result.stderr.split())
