"""The task of a peer's program, made from a text and a tokenizer of ours."""

import sys
from pathlib import Path

from environments import PEERS

from minimind_data.tokenizer.loading import Tokenizer

sys.path.insert(0, str(PEERS))
from task import Task


def write_task(
    tokenizer: Tokenizer, *, text: Path, parts: Path, tokenizer_file: Path, out: Path, cores: int
) -> Task:
    """Write a task.json beside `out`, and the tokenizer; return the task."""
    tokenizer_file.write_text(tokenizer.json, encoding="utf-8")
    task = Task(
        text=text,
        parts=parts,
        tokenizer=tokenizer_file,
        out=out,
        cores=cores,
        bos_id=tokenizer.info.bos_id,
        eos_id=tokenizer.info.eos_id,
        eos_token=tokenizer.reference.id_to_token(tokenizer.info.eos_id),
        vocab_size=tokenizer.info.vocab_size,
    )
    if task.vocab_size > 2**16:
        sys.exit(f"the tokenizer has {task.vocab_size:,} entries; the peers' programs write uint16")
    task.write(out.with_name("task.json"))
    return task
