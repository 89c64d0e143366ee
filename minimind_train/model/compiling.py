"""How the layers of a model are run in training: compiled, and with activation checkpointing.

Both change only the `forward` of each layer: the parameters, their names and the outputs stay the same, up to rounding.
All layers share one compiled function, so starting takes as long for eighty layers as for eight. For a batch of another size, such as
the short last one, torch compiles once more, and then for all sizes.
"""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from minimind_data.errors import UserError
from minimind_train.model.document_attention import DocumentAttention
from minimind_train.model.transformer import MiniMind


def compile_layers(model: MiniMind) -> None:
    """Compile the layers, each in its first pass; if activations are recomputed too, this is called first."""
    DocumentAttention.stay_out_of_graphs()
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward)


def recompute_activations(model: MiniMind) -> None:
    """Keep only the input of each layer, and compute its activations again in the backward pass: about a third more work.

    Dropout drops the same elements again, so the gradients are the same as without it, bit for bit.
    """
    for layer in model.model.layers:
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=model.config.dropout > 0
        )


@contextlib.contextmanager
def user_error_on_failed_compile() -> Iterator[None]:
    """Turn torch's error, when it cannot compile on this machine, into one sentence."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise UserError(
            f"`compile`: torch cannot compile the model here ({reason})",
            remedy="on the CPU it needs a C++ compiler such as g++, on a GPU Triton and a C compiler; mend "
            "that, delete a file that is named there as broken, or go on with `resume` and `compile=False`",
            option="compile",
        ) from None
