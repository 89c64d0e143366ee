"""The README does not lie: its code runs, and its commands and flags exist."""

import re
import shlex
import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minimind_cli import data, train
from minimind_data.build import tokenize
from minimind_data.plan import TokenizeOptions

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(
    {line.split("  #")[0].strip() for line in README.splitlines() if line.startswith("    mm-")}
)


def test_the_example_loop_runs(tmp_path):
    tokenize([ROOT / "data" / "sample.jsonl"], TokenizeOptions(out=tmp_path / "mine", workers=1))
    start = README.index("    from minimind_data import")
    code = textwrap.dedent(README[start : README.index("\n\n[docs/loops.md]", start)])
    assert "data/mine" in code
    seen: dict = {}
    exec(code.replace("data/mine", str(tmp_path / "mine")), seen)  # noqa: S102 - the README's own code
    assert seen["batch"]["targets"].shape == (len(seen["windows"]) % 32 or 32, 340)
    assert seen["sampler"].state_after(1)["position"] == 32


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_exists_with_its_flags(command):
    program, name, *arguments = shlex.split(command)
    app = data.app if program == "mm-data" else train.make([name])
    told = CliRunner().invoke(app, [name, "--help"])
    assert told.exit_code == 0
    for flag in [argument for argument in arguments if argument.startswith("--")]:
        assert re.search(rf"{flag}\b", told.stdout), flag


def test_the_chinese_one_has_the_same_commands_and_names_the_same_files():
    chinese = (ROOT / "README.zh.md").read_text(encoding="utf-8")

    def told(text):
        return sorted(
            line.split("  #")[0].split()
            for line in text.splitlines()
            if line.startswith(("    mm-", "    make"))
        )

    assert told(chinese) == told(README)
    for pattern in (r"\]\(([^)]+)\)", r"`([\w/.-]+\.py)"):
        assert set(re.findall(pattern, chinese)) ^ set(re.findall(pattern, README)) <= {
            "README.zh.md",
            "README.md",
        }


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 8


def test_every_file_that_is_named_is_there():
    paths = set(re.findall(r"`((?:minimind_data|minimind_train|benchmarks|cli|data)/[\w./-]+\.\w+)`", README))
    assert len(paths) > 8
    assert [path for path in paths if not (ROOT / path).exists()] == []
