"""litdata: optimize() over the parts of the text with a worker for each core, TokensLoader chunks of 64 MB.

Its workers divide the inputs, so it gets the text in parts, in order. The user writes how a part becomes tokens: here by the thousand
with `tokenizers`, with mm-data's BOS and EOS, in uint16.
"""

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from litdata import TokensLoader, optimize
from task import Task
from tokenizers import Tokenizer

_BATCH = 1000


def tokenize(part: str, task: Task) -> Iterator[torch.Tensor]:
    tokenizer = Tokenizer.from_file(str(task.tokenizer))
    with Path(part).open(encoding="utf-8") as lines:
        while texts := [json.loads(line)["text"] for line in itertools.islice(lines, _BATCH)]:
            for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                yield torch.from_numpy(np.array([task.bos_id, *encoding.ids, task.eos_id], np.uint16))


def main() -> None:
    task = Task.read()
    optimize(
        fn=functools.partial(tokenize, task=task),
        inputs=[str(path) for path in sorted(task.parts.iterdir())],
        output_dir=str(task.out / "chunks"),
        chunk_bytes="64MB",
        num_workers=task.cores,
        item_loader=TokensLoader(),
        reorder_files=False,
        keep_data_ordered=True,
        verbose=False,
    )


if __name__ == "__main__":
    main()
