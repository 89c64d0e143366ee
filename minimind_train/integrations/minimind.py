"""Replacements for classes in MiniMind's own training scripts: the same calls, the same samples, and no text is tokenized twice.

    from minimind_train.integrations.minimind import DistributedSampler, PretrainDataset, SkipBatchSampler

- `PretrainDataset(data_path, tokenizer, max_length)` returns, for each document, the tuple that MiniMind's returns, id for id. It reads
  windows of layout `pad` from memory maps.
- `DistributedSampler(dataset)` is called as torch's is. Its order is that of `SampleOrder`, computed piece by piece, and
  the same for any number of devices: a step of the same global batch has the same samples on all of them.
- `SkipBatchSampler(sampler, batch_size, skip_batches)` yields MiniMind's batches. It finds the first batch by arithmetic.

MiniMind keeps its position in steps of one device, and rounds it down where the number of devices has changed. A **position** here is
the number of samples of the epoch that all devices together have consumed: `SkipBatchSampler.position_after` returns it, to be saved
beside the step, and `SkipBatchSampler(..., position=...)` starts exactly there, on any number of devices and with any batch size.

Differences: MiniMind turns any value of `text` into a string, and makes a sample of BOS and EOS out of an empty text. Here a text
that is not a string is a bad record, and an empty one makes no document. Where PAD is the same token as EOS or BOS, MiniMind ignores
both; here both are learned.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, distributed
from torch.utils.data import Dataset, Sampler

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.dataset.format import TOKENIZER_NAME, TokenizerInfo
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.files import FolderLock
from minimind_data.tokenizer.loading import NONE, cached_tokenizer, refuse_other_tokenizer
from minimind_data.windows.opening import open_windows
from minimind_train.batches.torch_loader import WindowDataset
from minimind_train.order.sample_order import OrderKind, SampleOrder
from minimind_train.progress import Say, say_on_stderr

__all__ = ["DistributedSampler", "PretrainDataset", "SkipBatchSampler"]

_PIECE = 4096
"""How many indices are computed at once where they are asked for one by one."""


class PretrainDataset(Dataset[tuple[Tensor, Tensor]]):
    """The documents of a dataset, each a sample (input_ids, labels): int64 [max_length] each, unshifted, PAD as -100 in the labels.

    Args:
        data_path: the folder of a dataset; or the text that MiniMind takes, which is then tokenized once, into the folder
            `DATA_PATH.shards` beside it. Where there are several processes, one does that while the others wait.
        tokenizer: of `transformers`; it must be the one that the dataset was made with.
        max_length: tokens of a sample.
        say: takes lines for the user.

    Raises:
        UserError: there is no such dataset, or it was made with another tokenizer.
    """

    def __init__(
        self, data_path: str | Path, tokenizer: Any, max_length: int = 512, *, say: Say = say_on_stderr
    ) -> None:
        folder = Path(data_path)
        if folder.is_file():
            folder = _tokenize_once(folder, tokenizer, say)
        shards = ShardSet.open(folder)
        if shards.manifest.kind != "pretrain":
            raise UserError(
                f"a dataset of kind {shards.manifest.kind}; this takes one of kind pretrain", where=folder
            )
        info = shards.manifest.tokenizer
        passed = TokenizerInfo(
            sha256="",  # its file is not known
            vocab_size=len(tokenizer),
            bos_id=tokenizer.bos_token_id,
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
        )
        refuse_other_tokenizer(
            (shards.folder, info),
            ("the tokenizer that was passed", passed),
            why="samples must have the ids of the one that the loop knows",
            remedy="tokenize the text again with this tokenizer, or pass the dataset's",
            same=lambda: (
                info.special_ids == passed.special_ids
                and cached_tokenizer(shards.tokenizer_json, info).reference.get_vocab(with_added_tokens=True)
                == tokenizer.get_vocab()
            ),
        )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._windows = WindowDataset(open_windows(shards, layout="pad", seq_len=max_length, labels=True))

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self._windows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one sample."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Return many samples, read in one gather; this is what a DataLoader calls for a batch."""
        return [(sample["input_ids"], sample["labels"]) for sample in self._windows.__getitems__(indices)]


class DistributedSampler(Sampler[int]):
    """A device's share of each epoch, called as torch's `DistributedSampler` is.

    Every device gets the same number of samples. Where the dataset cannot be divided so, the first samples of the epoch
    are taken again at its end, as in torch, or with `drop_last` the last ones are left out.

    Args:
        dataset: anything that has a length.
        num_replicas: how many devices share an epoch; by default what `torch.distributed` says, or 1 where it is not initialized.
        rank: which of them this is; by default likewise.
        shuffle: shuffle anew in each epoch.
        seed: decides the order.
        drop_last: leave out the samples that would make the shares differ.
    """

    def __init__(  # noqa: PLR0917 - torch's own signature
        self,
        dataset: Any,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        is_distributed = distributed.is_available() and distributed.is_initialized()
        self.num_replicas = num_replicas or (distributed.get_world_size() if is_distributed else 1)
        self.rank = rank if rank is not None else (distributed.get_rank() if is_distributed else 0)
        if not 0 <= self.rank < self.num_replicas:
            raise ValueError(
                f"rank must be from 0 to num_replicas - 1, not {self.rank} of {self.num_replicas}"
            )
        kind: OrderKind = "shuffled" if shuffle else "sequential"
        self.order = SampleOrder(num_windows=len(dataset), seed=seed, kind=kind)
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch, which has an order of its own; a training loop calls this before each, as with torch's sampler."""
        self.epoch = epoch

    def share_from(self, position: int) -> "_EpochShare":
        """Return the rest of the epoch for this device, when all devices together have consumed so many samples of it."""
        return _EpochShare(self, position)

    def __len__(self) -> int:
        """Return the number of samples of this device."""
        return len(self.share_from(0))

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of the epoch."""
        share = self.share_from(0)
        return (index for first in range(0, len(share), _PIECE) for index in share[first : first + _PIECE])


class _EpochShare:
    """A device's share of an epoch from a position on: a sequence whose slices are computed when they are asked for."""

    def __init__(self, sampler: DistributedSampler, position: int) -> None:
        n, world_size = sampler.order.num_windows, sampler.num_replicas
        num_left = max(0, n - position)
        self._length = num_left // world_size if sampler.drop_last else -(-num_left // world_size)
        self._first = position + sampler.rank
        self._step = world_size
        self._order = sampler.order
        self._epoch = sampler.epoch

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, piece: slice) -> list[int]:
        n = self._order.num_windows
        numbers = np.arange(*piece.indices(self._length), dtype=np.int64)
        indices = (self._first + numbers * self._step) % n
        windows: list[int] = self._order.windows(self._epoch * n + indices).tolist()
        return windows


class SkipBatchSampler(Sampler[list[int]]):
    """The batches of a sampler from a position on, called as MiniMind's `SkipBatchSampler` is.

    Args:
        sampler: a `DistributedSampler` of this module or a list of indices, in which the position is found by arithmetic; or any other
            sampler, which is read up to the position.
        batch_size: samples of this device in a batch; the last may have fewer.
        skip_batches: how many batches are done.
        position: the exact position, in samples of all devices, as `position_after` returned it; `skip_batches` is then ignored.
            (Another sampler knows only its own device, which has done its share of them, rounded down.)
    """

    def __init__(
        self,
        sampler: Any,
        batch_size: int,
        skip_batches: int = 0,
        *,
        position: int | None = None,
    ) -> None:
        if batch_size < 1 or skip_batches < 0 or (position or 0) < 0:
            raise ValueError(
                f"batch_size is 1 or more, skip_batches and position are 0 or more, not {batch_size}, {skip_batches} and {position}"
            )
        self.sampler = sampler
        self.batch_size = batch_size
        self.skip_batches = skip_batches
        self._samples_in_batch = batch_size * getattr(sampler, "num_replicas", 1)
        self.position = skip_batches * self._samples_in_batch if position is None else position

    def position_after(self, batches: int) -> int:
        """Return how many samples of the epoch all devices have consumed after so many batches of this sampler."""
        return self.position + batches * self._samples_in_batch

    def __len__(self) -> int:
        """Return the number of batches."""
        if isinstance(self.sampler, DistributedSampler):
            num_left = len(self.sampler.share_from(self.position))
        else:
            num_left = len(self.sampler) - self._own_position
        return max(0, -(-num_left // self.batch_size))

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches from the position on."""
        if isinstance(self.sampler, DistributedSampler):
            return _batches(self.sampler.share_from(self.position), 0, self.batch_size)
        if isinstance(self.sampler, Sequence):
            return _batches(self.sampler, self._own_position, self.batch_size)
        return _batches_after(self.sampler, self._own_position, self.batch_size)

    @property
    def _own_position(self) -> int:
        """The position in a sampler that knows only its own device."""
        return self.position // getattr(self.sampler, "num_replicas", 1)


def _batches(indices: "_EpochShare | Sequence[int]", first: int, batch_size: int) -> Iterator[list[int]]:
    return (list(indices[start : start + batch_size]) for start in range(first, len(indices), batch_size))


def _batches_after(sampler: Iterable[int], first: int, batch_size: int) -> Iterator[list[int]]:
    rest = islice(sampler, first, None)
    while batch := list(islice(rest, batch_size)):
        yield batch


def _tokenize_once(text: Path, tokenizer: Any, say: Say) -> Path:
    """Make the dataset of a text, unless it is there already, and return its folder."""
    folder = text.with_name(f"{text.name}.shards")
    source = Path(getattr(tokenizer, "name_or_path", "")) / TOKENIZER_NAME
    if not source.is_file():
        raise UserError(
            f"the tokenizer comes from no folder with a {TOKENIZER_NAME}",
            where=text,
            remedy="make the dataset by `tokenize` with the folder of one as `tokenizer`, and pass its folder as `data_path`",
            option="data_path",
        )
    options = TokenizeOptions(
        out=folder,
        tokenizer=source,
        bos_token=tokenizer.bos_token or NONE,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
    )
    busy = f"{text}: another process is tokenizing it; waiting for it"
    with FolderLock(text.with_name(f"{folder.name}.lock"), busy, wait=say):
        summary = tokenize([text], options, say=say)
    if not summary.already_done:
        say(f"{text}: tokenized into {folder}")
    return folder
