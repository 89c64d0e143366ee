"""Refusing, before anything is built, what cannot fit: the dataset into the model, or the model and a step's samples into memory.

These are lower bounds, from the options alone. What passes may still run out of memory in a step; see `devices.user_error_on_out_of_memory`.
"""

import torch

from minimind_data.errors import UserError
from minimind_train.batches.datasets import Datasets
from minimind_train.parallel.devices import refuse_too_large
from minimind_train.run.options import RunOptions
from minimind_train.training.learner import Compute

__all__ = ["refuse_oversized"]


def refuse_oversized(options: RunOptions, datasets: Datasets, compute: Compute) -> None:
    """Refuse a run that cannot be trained here.

    Raises:
        UserError: a step has too few samples, the vocabularies or lengths do not fit, or the memory is too small.
    """
    device, world = compute.device, compute.world
    if options.training.global_batch < world.size:
        raise UserError(
            f"`global_batch` {options.training.global_batch} has no sample for some of {world.size} "
            "processes",
            remedy="take a larger one, or fewer processes",
            option="global_batch",
        )
    vocab_size, room = datasets.tokenizer.vocab_size, options.model.vocab_size
    if vocab_size > room:
        raise UserError(
            f"a vocabulary of {vocab_size} entries does not fit a model of {room}",
            where=datasets.folder,
            remedy="start a new run",
        )
    if options.data.seq_len > options.model.longest_sequence:
        raise UserError(
            f"`seq_len` {options.data.seq_len} is longer than the model's `max_position_embeddings` "
            f"{options.model.longest_sequence}",
            remedy="change one of them",
            option="seq_len",
        )
    size = options.model.num_parameters
    what = f"{size / 1e6:,.1f} M parameters, their gradients and the optimizer's averages"
    least = 12 if options.optim.optimizer == "muon" else 16
    if options.lora.lora_rank:
        least, what = 4, f"{size / 1e6:,.1f} M parameters"
    share = world.size if options.training.parallel == "fsdp" else 1
    on_one_device = world.place.local_size if device.type == "cpu" else 1
    refuse_too_large(
        what,
        least * size * on_one_device // share,
        device,
        "take a smaller `hidden_size` or `num_hidden_layers`, or more devices with `parallel` fsdp",
    )
    # Two int64 a token, and its position where documents are kept apart.
    samples = (
        (24 if options.data.document_mask else 16) * options.training.global_batch * options.data.seq_len
    )
    refuse_too_large("the samples of a step", samples, torch.device("cpu"), "take a smaller `global_batch`")
