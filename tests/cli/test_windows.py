"""On Windows every command ends with one sentence, before anything is imported that is not there."""

import subprocess
import sys

import pytest

ON_WINDOWS = """
import sys
sys.modules.update(dict.fromkeys(["fcntl", "resource", "pwd"]))  # imports of these fail
sys.platform = "win32"
from minimind_cli import entry
sys.argv = ["mm", *{words!r}]
entry.{program}()
"""


@pytest.mark.parametrize("program", ["data", "train"])
@pytest.mark.parametrize("words", [[], ["--help"], ["pretrain", "--shards", "data"]])
def test_windows_is_told_of_wsl(program, words):
    code = ON_WINDOWS.format(program=program, words=words)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: Windows itself is not supported; use WSL2")
