"""What the library says of its parameters, a user of the command line reads of flags."""

import typer.main

from minimind_cli import data, train
from minimind_cli.flags import Flags


def flags(command, program=None):
    app = train.app if program is None else program
    return Flags.of(typer.main.get_command(app).commands[command])


def test_parameters_become_flags():
    spoken = flags("pretrain")
    assert spoken("take a longer `seq_len`") == "take a longer --seq-len"
    assert spoken("go on with `resume` and `compile=False`") == "go on with --resume and --no-compile"
    assert spoken("pass `reweight`, with `save_best`") == "pass --reweight-at-resume, with --save-best"


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
