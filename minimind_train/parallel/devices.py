"""The device that a run computes on: what `auto` means here, how much memory the device has, and the error when that runs out.

`world` decides which device each of several ranks gets, and `model.precision` in which dtype it computes.
"""

import contextlib
import os
from collections.abc import Iterator

import torch

from minimind_data.errors import UserError

_DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu")


def resolve_device(name: str) -> torch.device:
    """Return the device that a name such as `auto`, `cpu`, `cuda`, `cuda:1` or `mps` means here.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    refusal = UserError(
        f"`device` {name}: this machine, or this build of torch, has none",
        remedy="try `device` auto",
        option="device",
    )
    if name.partition(":")[0] not in _DEVICE_TYPES:
        raise refusal
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):  # backends differ in what they raise
        raise refusal from None
    return device


def memory_of(device: torch.device) -> int | None:
    """Return the total memory of a device in bytes, or None where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def refuse_too_large(what: str, num_bytes: int, device: torch.device, remedy: str) -> None:
    """Refuse what cannot fit a device, before the system kills the process for trying.

    Args:
        what: what needs the memory, for the error.
        num_bytes: how much it needs at least.
        device: where it goes.
        remedy: what the user can do.

    Raises:
        UserError: it needs more than the device has.
    """
    memory = memory_of(device)
    if memory is not None and num_bytes > memory:
        raise UserError(
            f"{what} take at least {num_bytes / 2**30:,.1f} GiB and {device} has {memory / 2**30:,.1f} GiB",
            remedy=remedy,
        )


@contextlib.contextmanager
def user_error_on_out_of_memory(remedy: str) -> Iterator[None]:
    """Turn the errors of memory that runs out in the block, of the device or the host, into one sentence that ends in `remedy`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # On the CPU torch raises a plain RuntimeError, recognised by its text alone; so do some CUDA calls, for example for pinned memory.
        is_out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
            words in str(error) for words in ("allocate memory", "out of memory")
        )
        if not is_out_of_memory:
            raise
        reason = str(error).partition("\n")[0] or "MemoryError"
        raise UserError(f"the memory is used up ({reason})", remedy=remedy) from None
