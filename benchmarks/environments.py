"""A virtual environment for each peer, made from the pinned requirements in benchmarks/peers/NAME.txt when it is first needed.

They are in benchmarks/.venvs, which git ignores and which can be deleted at any time.
"""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

PEERS = Path(__file__).with_name("peers")
_VENVS = Path(__file__).with_name(".venvs")
_STAMP = "made-from"
_LAST_WORDS = 300


class NoEnvironmentError(Exception):
    """A peer cannot be installed here; the message is pip's."""


def environment(name: str) -> Path:
    """Return the folder of executables of a peer's environment.

    Raises:
        NoEnvironmentError: the environment cannot be made.
    """
    requirements = PEERS / f"{name}.txt"
    wanted = f"{sys.version}\n{hashlib.sha256(requirements.read_bytes()).hexdigest()}\n"
    folder = _VENVS / name
    stamp = folder / _STAMP
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"making {folder}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [
            folder / "bin" / "python",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
        ]
        done = subprocess.run(
            [*install, "--requirement", requirements], capture_output=True, text=True, check=False
        )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
            raise NoEnvironmentError(" ".join(errors)[-_LAST_WORDS:])
        stamp.write_text(wanted)
    return folder / "bin"


def pinned_version(name: str, package: str) -> str:
    """Return the version of a package that a peer's requirements pin."""
    lines = (PEERS / f"{name}.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{package}=="))
