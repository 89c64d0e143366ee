"""What the demos share: commands that are printed as one would type them, and then run."""

import shlex
import subprocess
import sys
from pathlib import Path


def title(text: str) -> None:
    """Print a heading."""
    print(f"\n== {text}", flush=True)


def shown(command: list[str]) -> list[str]:
    """Print a command as one would type it, and return it with this environment's own program in front."""
    print("$", shlex.join(command), flush=True)
    return [str(Path(sys.executable).with_name(command[0])), *command[1:]]


def run(*command: str) -> None:
    """Run a command, or end the demo where it fails."""
    _refuse_failure(subprocess.run(shown(list(command)), check=False).returncode)


def output_of(*command: str) -> str:
    """Run a command, or end the demo where it fails; return what it prints, which is shown too."""
    result = subprocess.run(shown(list(command)), check=False, stdout=subprocess.PIPE, encoding="utf-8")
    print(result.stdout, end="", flush=True)
    _refuse_failure(result.returncode)
    return result.stdout.strip()


def _refuse_failure(status: int) -> None:
    if status:
        sys.exit(f"error: the command above ended with status {status}")
