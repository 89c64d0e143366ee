"""Megatron Core: GPTDataset, its C++ index builder and cache, under our version of the batch sampler of Megatron-LM.

The documents are shuffled, cut into windows, and the windows are shuffled. All three orders are arrays on disk, made when the dataset is
opened first and mapped afterwards. They exist before anything is measured here; the time to make them is reported separately. A state is
the number of samples consumed, where the sampler's range begins. No attention mask is made, which is the faster way.
"""

import itertools
import time
import warnings
from collections.abc import Iterator

import numpy as np
from load_task import LoadTask, run
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import Split
from sparse import sparse_stream
from torch import Tensor
from torch.utils.data import DataLoader

_GROWN_DOCUMENT_TOKENS = 500


class Vocabulary:
    """The part of a tokenizer that a GPTDataset needs."""

    pad = -1

    def __init__(self, task: LoadTask) -> None:
        self.eod = self.eos = task.eos_id
        self.vocab_size = task.vocab_size
        self.unique_identifiers = {"class": "Vocabulary", "vocab_size": task.vocab_size}


def opened(task: LoadTask) -> GPTDataset:
    config = GPTDatasetConfig(
        random_seed=42,
        sequence_length=task.seq_len,
        blend=([str(task.folder / "text_document")], None),
        split="1,0,0",
        path_to_cache=str(task.folder / "cache"),
        tokenizer=Vocabulary(task),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    prefix = str(task.folder / "text_document")
    documents = GPTDataset.build_low_level_dataset(prefix, config)
    indices = np.arange(GPTDataset.numel_low_level_dataset(documents), dtype=np.int32)
    return GPTDataset(documents, prefix, indices, None, Split.train, config)


def index_seconds(task: LoadTask) -> float:
    start = time.monotonic()
    opened(task)
    return time.monotonic() - start


def write(task: LoadTask) -> float:
    builder = IndexedDatasetBuilder(str(task.folder / "text_document.bin"), dtype=np.uint16)
    for document in task.documents():
        builder.add_document(document, [len(document)])
    builder.finalize(str(task.folder / "text_document.idx"))
    return index_seconds(task)


def grow(task: LoadTask) -> float:
    count = -(-(task.num_windows * task.seq_len + 1) // _GROWN_DOCUMENT_TOKENS)
    builder = IndexedDatasetBuilder(str(task.folder / "text_document.bin"), dtype=np.uint16)
    builder.sequence_lengths = np.full(count, _GROWN_DOCUMENT_TOKENS, np.int32)
    builder.document_indices = np.arange(count + 1)
    builder.finalize(str(task.folder / "text_document.idx"))
    sparse_stream(task.folder / "text_document.bin", count * _GROWN_DOCUMENT_TOKENS)
    return index_seconds(task)


def batches(task: LoadTask, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    samples = opened(task)
    consumed = iter(range(start * task.batch, len(samples)))
    order = iter(lambda: list(itertools.islice(consumed, task.batch)), [])
    loader = DataLoader(
        samples,
        batch_sampler=(batch for batch in order if len(batch) == task.batch),
        num_workers=task.workers,
    )
    return ((batch["tokens"], batch["labels"]) for batch in loader)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    run(write=write, batches=batches, grow=grow)
