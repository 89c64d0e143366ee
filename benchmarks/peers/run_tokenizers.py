"""Hugging Face `tokenizers` directly: json, encode_batch_fast by the thousand, one file of uint16, and nothing that can be left out.

Writes tokens.bin, and lengths.bin with the number of tokens of each document as int32.
"""

import json

import numpy as np
from task import Task
from tokenizers import Tokenizer

_BATCH = 1000


def main() -> None:
    task = Task.read()
    tokenizer = Tokenizer.from_file(str(task.tokenizer))
    lengths: list[int] = []
    with (
        task.text.open(encoding="utf-8") as lines,
        (task.out / "tokens.bin").open("wb") as out,
    ):

        def write(texts: list[str]) -> None:
            for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                ids = np.array([task.bos_id, *encoding.ids, task.eos_id], "<u2")
                out.write(ids.tobytes())
                lengths.append(len(ids))

        texts: list[str] = []
        for line in lines:
            texts.append(json.loads(line)["text"])
            if len(texts) == _BATCH:
                write(texts)
                texts = []
        write(texts)
    np.array(lengths, "<i4").tofile(task.out / "lengths.bin")


if __name__ == "__main__":
    main()
