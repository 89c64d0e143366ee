"""How the layers of a model are run in training: compiled, and with their activations computed again instead of kept.

Both change one layer's `forward` and nothing else: the parameters, their names and what the model gives stay the same, up to rounding.
Layers are alike, so compiling one compiles all: starting takes as long for eight layers as for eighty. A batch of another size, such as
the short last one, is compiled for once more, and then for all sizes.
"""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from minimind_data.errors import UserError
from minimind_train.model.documents import Documents
from minimind_train.model.transformer import MiniMind


def compile_layers(model: MiniMind) -> None:
    """Compile the layers, each at its first pass; before `recompute_activations`, if both are wanted."""
    Documents.stay_out_of_graphs()
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward)


def recompute_activations(model: MiniMind) -> None:
    """Keep of each layer only what goes in, and compute the rest again in the backward pass: about a third more work.

    Dropout drops the same again, so the gradients are what they are without, bit for bit.
    """
    for layer in model.model.layers:
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=model.config.dropout > 0
        )


@contextlib.contextmanager
def user_error_on_failed_compile() -> Iterator[None]:
    """Turn what torch raises when it cannot compile here into one sentence."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise UserError(
            f"--compile: torch cannot compile the model here ({reason}); on the CPU it needs a C++ compiler such as g++, on a GPU "
            "Triton and a C compiler; mend that, delete a file that is named there as broken, or go on with --resume --no-compile"
        ) from None
