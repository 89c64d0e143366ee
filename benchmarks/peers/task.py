"""The task of every peer's program. Standard library only, because each peer's own environment imports it."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task: a text, a tokenizer, a number of cores."""

    text: Path
    """JSON lines with `text` and `id`."""
    parts: Path
    """A folder with the same lines in as many files as there are cores, for tools that share out files, not lines."""
    tokenizer: Path
    """A tokenizer.json; tokenizer_config.json lies beside it."""
    out: Path
    """A folder that exists and is empty."""
    cores: int
    bos_id: int
    eos_id: int
    eos_token: str
    vocab_size: int

    def write(self, path: Path) -> None:
        content = {
            name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()
        }
        path.write_text(json.dumps(content))

    @classmethod
    def read(cls) -> Self:
        """Read the file named by the first argument."""
        content = json.loads(Path(sys.argv[1]).read_bytes())
        kinds = {field.name: field.type for field in dataclasses.fields(cls)}
        return cls(**{name: Path(value) if kinds[name] is Path else value for name, value in content.items()})
