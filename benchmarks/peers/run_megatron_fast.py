"""Megatron-LM's tools/preprocess_data_fast.py, in our version: gigatoken reads and encodes the whole file at once.

As in the tool: gigatoken's own JSONL reader and all its threads, one array of all documents, an end of document after each by numpy, and
Megatron Core's builder. The newest Megatron Core for Python 3.11 lacks the builder's `add_documents`, which that tool calls; its work
is done here on the builder.
"""

import awkward
import gigatoken
import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from task import Task


def main() -> None:
    task = Task.read()
    tokenizer = gigatoken.Tokenizer(str(task.tokenizer))
    documents = tokenizer.encode_files(
        gigatoken.JsonlFileSource([str(task.text)], field="text"), parallel=True
    )
    builder = IndexedDatasetBuilder(
        str(task.out / "text_document.bin"), dtype=DType.optimal_dtype(task.vocab_size)
    )
    lengths = np.asarray(awkward.num(documents, axis=1))
    ids = np.asarray(awkward.flatten(documents), dtype=builder.dtype)
    ids = np.insert(ids, np.cumsum(lengths), task.eos_id).astype(builder.dtype, copy=False)
    builder.data_file.write(ids.tobytes())
    builder.sequence_lengths.extend((lengths + 1).tolist())
    builder.document_indices.extend(range(1, len(lengths) + 1))
    builder.finalize(str(task.out / "text_document.idx"))


if __name__ == "__main__":
    main()
