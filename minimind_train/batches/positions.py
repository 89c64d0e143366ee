"""What stands at a position: which window, of which epoch, of which part of a mixture."""

from collections.abc import Mapping
from typing import Any

from minimind_data.windows.base import Windows
from minimind_train.batches.mixed_windows import MixedWindows
from minimind_train.order.mixture import MixtureOrder, Order
from minimind_train.order.sample_order import SampleOrder


def introduce(order: MixtureOrder, position: int, wanted: str) -> list[str]:
    """Say of a mixture what holds at a position: the shares, how near they come to the weights, and where each part is."""
    stage = next(stage for stage in reversed(order.stages) if stage.start <= position)
    lines = [
        f"mixture of {len(order.names)}, wanted of the tokens: {wanted}; a pattern of {stage.period} windows:"
    ]
    for name, part, share, epochs in zip(
        order.names, order.parts, stage.shares, epochs_of(order, position).values(), strict=True
    ):
        lines.append(
            f"  {name}: {share} of {stage.period} windows ({share / stage.period:.4f}), "
            f"{part.num_windows:,} windows, {epochs:.4f} epochs done"
        )
    return lines


def window_at(order: Order, windows: Windows | MixedWindows, position: int) -> dict[str, Any]:
    """Say which window stands at a position: `part` (of a mixture), `epoch`, `window`, `shard` and `offset`, all of the part."""
    if isinstance(order, MixtureOrder) and isinstance(windows, MixedWindows):
        there = order.window(position)
        shard, offset = windows.parts[there.part].locate(there.window)
        part = {"part": order.names[there.part]}
        return part | {"epoch": there.epoch, "window": there.window, "shard": shard, "offset": offset}
    assert isinstance(order, SampleOrder)
    epoch, window = order.window(position)
    shard, offset = windows.locate(window)
    return {"epoch": epoch, "window": window, "shard": shard, "offset": offset}


def epochs_of(order: MixtureOrder, position: int) -> dict[str, float]:
    """Return how often each part has been gone through before a position, such as 1.25."""
    counts: Mapping[str, int] = dict(zip(order.names, order.taken(position), strict=True))
    return {
        name: round(count / part.num_windows, 4)
        for (name, count), part in zip(counts.items(), order.parts, strict=True)
    }
