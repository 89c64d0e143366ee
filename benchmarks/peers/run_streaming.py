"""MosaicML Streaming: one MDSWriter, in which each document is a sample, `ndarray:uint16`.

It writes from one process. The user writes the encoder: here `tokenizers` by the thousand on all cores, with mm-data's BOS and EOS.
"""

import itertools
import json

import numpy as np
from streaming import MDSWriter
from task import Task
from tokenizers import Tokenizer

_BATCH = 1000


def main() -> None:
    task = Task.read()
    tokenizer = Tokenizer.from_file(str(task.tokenizer))
    with (
        task.text.open(encoding="utf-8") as lines,
        MDSWriter(out=str(task.out / "mds"), columns={"tokens": "ndarray:uint16"}) as writer,
    ):
        while texts := [json.loads(line)["text"] for line in itertools.islice(lines, _BATCH)]:
            for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                writer.write({"tokens": np.array([task.bos_id, *encoding.ids, task.eos_id], np.uint16)})


if __name__ == "__main__":
    main()
