"""What the library says of its parameters, a user of the command line reads of flags."""

import ast
import re
from pathlib import Path

import typer.main

import minimind_data
import minimind_train
from minimind_cli import data, train
from minimind_cli.flags import Flags

FOR_THE_COMMAND_LINE = {
    "minimind_train/run/toml.py"
}  # run.toml is what --config reads, and says so in its first line
OTHER_PROGRAMS = {"ray start --head"}
IN_TOML = {"command"}
FUNCTIONS = {"tokenize"}
PACKAGES = {"tokenizers"}
OF_MINIMIND = {"data_path"}
FROM_PYTHON = {"say", "on_step", "stop"}


def strings():
    """(module, string) of both packages, without docstrings."""
    for package in (minimind_data, minimind_train):
        root = Path(package.__file__).parent
        for path in root.rglob("*.py"):
            tree = ast.parse(path.read_text("utf-8"))
            docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if (
                    isinstance(node, ast.Constant)
                    and isinstance(node.value, str)
                    and id(node) not in docstrings
                ):
                    yield path.relative_to(root.parent).as_posix(), node.value


def flags(command, program=None):
    app = train.app if program is None else program
    return Flags.of(typer.main.get_command(app).commands[command])


def test_parameters_become_flags():
    spoken = flags("pretrain")
    assert spoken("take a longer `seq_len`") == "take a longer --seq-len"
    assert spoken("go on with `resume` and `compile=False`") == "go on with --resume and --no-compile"
    assert spoken("pass `reweight`, with `save_best`") == "pass --reweight-at-resume, with --save-best"


def test_a_call_of_tokenize_becomes_its_command():
    call = (
        "`tokenize(['a b.jsonl', 'c'], TokenizeOptions(out='d', records=RecordSpec(field='x'), task=(1, 2), "
        "chat=ChatOptions(allow_special_in_content=True, empty_think_ratio=0.5)))`"
    )
    command = "mm-data tokenize 'a b.jsonl' c --out d --field x --task 1/2 --allow-special-in-content --empty-think-ratio 0.5"
    assert flags("tokenize", data.app)(call) == f"`{command}`"
    assert flags("tokenize", data.app)(call.replace("True", "False")) == (
        f"`{command.replace('--allow', '--no-allow')}`"
    )


def test_an_argument_is_called_as_the_help_calls_it():
    assert (
        flags("convert", data.app)("`source` is no `source_format` of these")
        == "SOURCE is no --from of these"
    )


def test_flags_of_another_command():
    spoken = flags("pretrain")
    assert (
        spoken("`mm-data tokenize` with `tokenizer` a.json") == "`mm-data tokenize` with --tokenizer a.json"
    )


def test_calls_become_commands():
    assert (
        flags("sft")("go on with `resume('my run', {'skip_positions': ['3:4', '7:9']})`")
        == "go on with `mm-train sft --run 'my run' --resume --skip-positions 3:4 --skip-positions 7:9`"
    )
    assert (
        flags("pretrain")("`locate('runs/it', position=7)`") == "`mm-data locate --run runs/it --position 7`"
    )


def test_other_code_stays():
    spoken = flags("pretrain")
    for sentence in (
        "run `jq -c '.[]'`",
        "`nothing`, `a.b`, `f(1)`, `verify`",
        "`` and `",
        "`seq_len=3`",
        "`def:`",
    ):
        assert spoken(sentence) == sentence


def test_the_library_knows_no_flags():
    for module, text in strings():
        if module not in FOR_THE_COMMAND_LINE:
            for program in OTHER_PROGRAMS:
                text = text.replace(program, "")  # noqa: PLW2901
            assert not re.search(r"(?<![\w-])--[a-z]", text), (module, text)


def test_what_the_library_calls_a_parameter_is_one_of_a_command():
    commands = [
        *typer.main.get_command(data.app).commands.values(),
        *typer.main.get_command(train.app).commands.values(),
    ]
    known = (
        {name for command in commands for name in Flags.of(command).on}
        | IN_TOML
        | FUNCTIONS
        | PACKAGES
        | OF_MINIMIND
        | FROM_PYTHON
    )
    for module, text in strings():
        for name in re.findall(r"`([a-z][a-z0-9_]*)(?:=False)?`", text):
            assert name in known, (module, text)
