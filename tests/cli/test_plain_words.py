"""What a user is told: nothing that was asked for is passed over in silence, and one is not many."""

import json
import re

import pytest

from minimind_data.reporting import counted
from tests.helpers.commands import mm_data, mm_train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one text in each form, and a dataset made of one of them."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "one.txt").write_text("a text\n")
    (folder / "one.jsonl").write_text(json.dumps({"text": "a record", "more": "more"}) + "\n")
    made = mm_data("tokenize", folder / "one.jsonl", "--out", folder / "data")
    assert made.exit_code == 0
    assert f"{folder / 'data'}: 1 document, 4 tokens in 1 shard (uint16)" in made.stdout
    return folder


def test_one_is_not_many(folder):
    assert (counted(1, "shard"), counted(0, "shard"), counted(2000, "shard")) == (
        "1 shard",
        "0 shards",
        "2,000 shards",
    )
    for command in (("info",), ("verify",), ("stats",)):
        told = mm_data(*command, folder / "data").stdout
        assert "1 document" in told or "files" in told
        assert "1 documents" not in told
        assert "1 shards" not in told
        assert "1 files" not in told


@pytest.mark.parametrize(("call", "first"), [(mm_data, "tokenize"), (mm_train, "pretrain")])
def test_the_list_of_commands_begins_at_the_first_and_cuts_no_sentence(call, first):
    told = call("--help", terminal_width=80).stdout
    commands = told.partition("Commands:\n")[2].splitlines()
    assert commands[0].split()[0] == first
    assert len(commands) >= 7
    assert [
        line for line in commands if not line.endswith(".") or line.endswith("...") or len(line) > 80
    ] == []


def test_the_help_of_a_run_begins_with_what_most_people_set():
    told = mm_train("sft", "--help", terminal_width=80).stdout
    assert re.findall(r"^  (--[a-z-]+)", told, re.MULTILINE)[:4] == [
        "--shards",
        "--run",
        "--resume",
        "--allow-change",
    ]
    assert "--shards TEXT " in told


@pytest.mark.parametrize(
    ("call", "command"), [(mm_data, "tokenize"), (mm_data, "locate"), (mm_train, "plot")]
)
def test_an_argument_that_may_stand_there_often_has_dots_once(call, command):
    assert call(command, "--help").stdout.partition("\n")[0].count("...") <= 1


@pytest.mark.parametrize("command", ["window", "locate"])
def test_an_option_of_pack_is_refused_elsewhere(folder, command):
    place = ("0",) if command == "window" else ("--position", "0")
    arguments = (command, folder / "data", *place, "--seq-len", "4", "--long-documents", "drop")
    refused = mm_data(*arguments)
    assert refused.exit_code == 2
    assert "--long-documents is for --layout pack, in layout concat it does nothing" in refused.stderr
    assert mm_data(*arguments, "--layout", "pack", "--seq-len", "20").exit_code == 0


def test_a_run_too_refuses_an_option_of_pack_elsewhere(folder):
    arguments = (
        "pretrain",
        "--shards",
        folder / "data",
        "--run",
        folder / "run",
        "--layout",
        "pad",
        "--long-documents",
        "cut",
    )
    refused = mm_train(*arguments)
    assert refused.exit_code == 2
    assert "in layout pad it does nothing" in refused.stderr
    assert not (folder / "run").exists()


def test_eval_measures_one_dataset(folder):
    refused = mm_train(
        "eval", "--run", folder / "run", "--shards", folder / "data", "--shards", folder / "other"
    )
    assert refused.exit_code == 2
    assert "--shards is given 2 times, but one dataset is evaluated at a time" in refused.stderr


@pytest.mark.parametrize(
    ("name", "option", "said"),
    [
        (
            "one.txt",
            ("--template", "{text} {more}"),
            "--template does nothing: it is for JSON lines and Parquet",
        ),
        ("one.txt", ("--field", "more"), "--field does nothing: it is for JSON lines and Parquet"),
        ("one.jsonl", ("--separator", "x"), "--separator does nothing: it is for text"),
        ("one.jsonl", ("--template", "{text} {more}"), None),
        ("one.jsonl", ("--field", "more"), None),
        ("one.txt", ("--separator", "x"), None),
    ],
)
def test_an_option_of_another_form_of_text_is_said_to_do_nothing(folder, tmp_path, name, option, said):
    made = mm_data("tokenize", folder / name, "--out", tmp_path / "out", *option)
    assert made.exit_code == 0
    assert ("does nothing" in made.stderr) is (said is not None)
    assert (said or "") in made.stderr


def test_where_one_input_has_the_form_the_option_does_something(folder, tmp_path):
    inputs = (folder / "one.txt", folder / "one.jsonl")
    for option in (("--template", "{text} {more}"), ("--separator", "x")):
        made = mm_data("tokenize", *inputs, "--out", tmp_path / option[0], *option)
        assert "does nothing" not in made.stderr


@pytest.mark.parametrize(
    ("program", "arguments"),
    [(mm_data, ("tokenize", "x", "--engine", "steam")), (mm_train, ("pretrain", "--dtype", "fp8"))],
)
def test_a_choice_that_is_none_is_told_without_python_s_words(program, arguments):
    refused = program(*arguments)
    assert refused.exit_code == 2
    assert f"Error: Invalid value for '{arguments[-2]}': '{arguments[-1]}' is not one of" in refused.stderr
