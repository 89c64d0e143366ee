"""What both demos need: commands that are printed as a user would type them, and then run."""

import shlex
import subprocess
import sys
from pathlib import Path


def title(text: str) -> None:
    """Print a heading."""
    print(f"\n== {text}", flush=True)


def show(command: list[str]) -> list[str]:
    """Print a command as a user would type it; return it with the path of its program in this environment."""
    print("$", shlex.join(command), flush=True)
    return [str(Path(sys.executable).with_name(command[0])), *command[1:]]


def run(*command: str) -> None:
    """Run a command; end the demo if it fails."""
    _exit_on_failure(subprocess.run(show(list(command)), check=False).returncode)


def output_of(*command: str) -> str:
    """Run a command, print its output and return it; end the demo if it fails."""
    result = subprocess.run(show(list(command)), check=False, stdout=subprocess.PIPE, encoding="utf-8")
    print(result.stdout, end="", flush=True)
    _exit_on_failure(result.returncode)
    return result.stdout.strip()


def _exit_on_failure(status: int) -> None:
    if status:
        sys.exit(f"error: the command above ended with status {status}")
