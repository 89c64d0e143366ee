"""docs/from-minimind.md leads to flags that there are, from every flag that MiniMind's scripts have."""

import re
from pathlib import Path

import pytest
import typer

from minimind_cli import train
from tests.helpers.minimind_flags import THEIRS, TRAINING

PAGE = (Path(__file__).parent.parent / "docs" / "from-minimind.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^## `([^`]*)`: `mm-train (\w+)`\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)


def flags_of(command):
    application = typer.main.get_command(train.app)
    parameters = application.commands[command].params
    return {flag for parameter in parameters for flag in (*parameter.opts, *parameter.secondary_opts)}


def rows(text):
    return [
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in text.splitlines()
        if line.startswith("| `")
    ]


def test_every_script_has_its_table():
    assert [script for script, _, _ in SECTIONS] == list(THEIRS)


@pytest.mark.parametrize(("script", "command", "text"), SECTIONS, ids=[script for script, _, _ in SECTIONS])
def test_a_table_begins_at_their_flags_and_ends_at_ours(script, command, text):
    ours = flags_of(command)
    told = re.findall(r"(?<![\w-])--[a-z][a-z-]*", " ".join(f"{here} {note}" for _, here, note in rows(text)))
    assert told
    assert set(told) <= ours
    theirs = {flag for cell, _, _ in rows(text) for flag in re.findall(r"--(\w+)", cell)}
    assert set(THEIRS[script]) <= theirs
    if command != "export":
        assert theirs <= {*TRAINING, *THEIRS[script], "nproc_per_node"}
