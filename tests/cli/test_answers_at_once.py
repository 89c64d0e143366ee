"""What needs no work is answered at once: help, wrong usage and completion import neither torch nor pyarrow."""

import json
import os
import subprocess
import sys

import pytest

# Answers command lines one after the other, as its one argument lists them: for each the exit status, what was printed, and which slow
# libraries have been imported by then.
PROGRAM = """
import contextlib, io, json, sys
from minimind_cli import entry
answers = []
for words in json.loads(sys.argv[1]):
    sys.argv, said, status = words, io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            getattr(entry, words[0].removeprefix("mm-"))()
        except SystemExit as error:
            status = error.code or 0
    slow = sorted({"torch", "pyarrow", "transformers"} & sys.modules.keys())
    answers.append([status, " ".join(said.getvalue().split()), slow])
print(json.dumps(answers))
"""
OF_DATA = [
    "tokenize",
    "commit",
    "train-tokenizer",
    "info",
    "verify",
    "window",
    "locate",
    "stats",
    "convert",
    "merge",
    "shuffle",
]
OF_TRAIN = ["pretrain", "sft", "dpo", "generate", "serve", "eval", "export", "plot"]
WRONG = {
    "pretrain --learning-rat 1": "No such option: --learning-rat",
    "sft --config nowhere.toml": "No such file or directory",
    "dpo --preset gpt-5": "no such preset; there are minimind-3",
    "pretrain --hidden-size 7": "does not divide",
    "pretrain --dtype int8": "fp32",
    "sft --layout concat": "cuts conversations apart",
    "pretrain --allow-change seq_len": "--allow-change is for --resume",
    "pretrain --resume --allow-change hidden_size": "not an option that may change",
    "generate --run here --checkpoint newest": "names no checkpoint",
    "generate --run here --top-p 2": "--top-p must be above 0",
    "generate --run here --system Be.": "--system goes with --chat",
    "generate --run here": "--prompt is missing, the text to continue",
    "eval --run here": "Missing option '--shards'",
    "eval --run here --shards one --shards two": "one dataset is evaluated at a time",
    "export --run here --to onnx --out there": "minimind",
    "plot --x time": "position",
    "train": "No such command",
}


def answers(lines, **environment):
    """The answers to command lines, each a list of words, in a process of their own."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(lines)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return zip(lines, json.loads(result.stdout), strict=True)


def test_help():
    commands = [["mm-data"], *(["mm-data", name] for name in OF_DATA)]
    commands += [["mm-train"], *(["mm-train", name] for name in OF_TRAIN)]
    for words, (status, said, imported) in answers([[*words, "--help"] for words in commands]):
        assert (words, status, imported) == (words, 0, [])
        assert f"Usage: {' '.join(words[:-1])}" in said


def test_wrong_usage():
    for words, (status, said, imported) in answers([["mm-train", *line.split()] for line in WRONG]):
        assert (words, status, imported) == (words, 2, [])
        assert WRONG[" ".join(words[1:])] in said


@pytest.mark.parametrize(
    ("typed", "completion"), [("mm-train pretrain --learn", "--learning-rate"), ("mm-train ex", "export")]
)
def test_completion(typed, completion):
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    ((_, answer),) = answers([["mm-train"]], _MM_TRAIN_COMPLETE="complete_bash", **words)
    assert answer == [0, completion, []]


def test_a_command_imports_no_other_command():
    """`mm-data info` starts without what `stats`, `convert` and `locate` need; only the list of all commands takes them all."""
    program = (
        "import sys; from minimind_cli import entry; sys.argv = ['mm-data', 'info', '--help']\n"
        "try: entry.data()\n"
        "except SystemExit: print(*sorted(sys.modules), sep='\\n')"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    imported = set(result.stdout.split())
    assert "minimind_data.build.pipeline" in imported
    assert not imported & {
        "minimind_data.interchange.conversion",
        "minimind_data.report.statistics",
        "minimind_train.batches.options",
        "minimind_cli.locate",
    }
