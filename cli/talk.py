"""A chat with a model in the terminal, or through a pipe: a line is a turn.

In a terminal Ctrl-C stops an answer and Ctrl-D leaves; through a pipe each line of standard input is answered on standard output.
"""

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from minimind_data.errors import UserError

from .flags import in_flags

if TYPE_CHECKING:
    from minimind_train.generation.chat_session import ChatSession

_PROMPT = "> "
_COMMANDS = "/clear begins a new conversation, Ctrl-C stops an answer, Ctrl-D or /exit leaves"


def talk(conversation: "ChatSession", prompt: str | None) -> None:
    """Answer `prompt`, or the lines of standard input until it ends.

    Raises:
        UserError: a line of a pipe cannot be used as a question; in a terminal the error is printed and the chat continues.
    """
    if prompt is not None:
        _say(conversation, prompt)
    elif sys.stdin.isatty():
        _in_terminal(conversation)
    else:
        if isinstance(sys.stdin, io.TextIOWrapper):
            # Invalid bytes must not end the loop here: the error then names their line.
            sys.stdin.reconfigure(errors="surrogateescape")
        for number, line in enumerate(sys.stdin, 1):
            try:
                if line.strip() and not _cleared(conversation, line):
                    _say(conversation, line.rstrip("\r\n"))
            except UserError as error:
                raise UserError(str(error), where=f"line {number} of standard input") from None


def _in_terminal(conversation: "ChatSession") -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, PLC0415 - with it imported, `input` has line editing and a history
    print(_COMMANDS, file=sys.stderr)
    for line in _lines():
        if not line.strip():
            continue
        if line.strip() == "/exit":
            return
        if _cleared(conversation, line):
            print("(a new conversation)", file=sys.stderr)
            continue
        try:
            _say(conversation, line)
        except KeyboardInterrupt:
            print(" …")
        except UserError as error:
            print(f"error: {in_flags(error)}", file=sys.stderr)
        print()


def _lines() -> Iterator[str]:
    """Yield the lines that are typed; Ctrl-C discards an unfinished one."""
    while True:
        try:
            yield input(_PROMPT)
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def _cleared(conversation: "ChatSession", line: str) -> bool:
    """Clear the conversation if the line asks for that; tell whether it does."""
    if line.strip() != "/clear":
        return False
    conversation.clear()
    return True


def _say(conversation: "ChatSession", text: str) -> None:
    for piece in conversation.answer(text):
        print(piece, end="", flush=True)
    print(flush=True)
