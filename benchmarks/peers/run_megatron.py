"""Megatron-LM's tools/preprocess_data.py, in our version, since the tool is not in the package megatron-core.

As in the tool: a pool of processes maps over the lines in chunks of 32. Each parses one with json and encodes it with Megatron Core's
tokenizer class. The parent appends document by document to an IndexedDatasetBuilder, with an end of document.
"""

import json
import multiprocessing

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from megatron.core.tokenizers import MegatronTokenizer
from task import Task

_CHUNK = 32
_state: dict[str, object] = {}


def prepare(folder: str, eod: int) -> None:
    _state["tokenizer"] = MegatronTokenizer.from_pretrained(folder, metadata_path={"library": "huggingface"})
    _state["eod"] = eod


def encode(line: str) -> list[int]:
    ids = _state["tokenizer"].tokenize(json.loads(line)["text"])
    if ids:
        ids.append(_state["eod"])
    return ids


def main() -> None:
    task = Task.read()
    dtype = DType.optimal_dtype(task.vocab_size)
    assert dtype == np.uint16
    builder = IndexedDatasetBuilder(str(task.out / "text_document.bin"), dtype=dtype)
    arguments = (str(task.tokenizer.parent), task.eos_id)
    with (
        multiprocessing.Pool(task.cores, initializer=prepare, initargs=arguments) as pool,
        task.text.open(encoding="utf-8") as lines,
    ):
        for ids in pool.imap(encode, lines, _CHUNK):
            builder.add_document(ids, [len(ids)])
        builder.finalize(str(task.out / "text_document.idx"))


if __name__ == "__main__":
    main()
