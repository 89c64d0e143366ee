"""What stands at a position: which window, of which epoch, of which part of a mixture."""

from collections.abc import Mapping
from typing import Any

from minimind_data.windows.base import Windows
from minimind_train.batches.mixed_windows import MixedWindows
from minimind_train.order.mixture import MixtureOrder, Order
from minimind_train.order.sample_order import SampleOrder


def mixture_lines(order: MixtureOrder, position: int, weights: str) -> list[str]:
    """Return lines that describe a mixture at a position: its weights, the shares that meet them, and the epochs of each part."""
    stage = next(stage for stage in reversed(order.stages) if stage.start <= position)
    lines = [
        f"mixture of {len(order.names)}, wanted of the tokens: {weights}; a pattern of {stage.period} windows:"
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
    """Return the window at a position: `part` (of a mixture), `epoch`, `window`, `shard` and `offset`, all within the part."""
    if isinstance(order, MixtureOrder) and isinstance(windows, MixedWindows):
        window = order.window(position)
        shard, offset = windows.parts[window.part].locate(window.window)
        part = {"part": order.names[window.part]}
        return part | {"epoch": window.epoch, "window": window.window, "shard": shard, "offset": offset}
    assert isinstance(order, SampleOrder)
    epoch, number = order.window(position)
    shard, offset = windows.locate(number)
    return {"epoch": epoch, "window": number, "shard": shard, "offset": offset}


def epochs_of(order: MixtureOrder, position: int) -> dict[str, float]:
    """Return the epochs of each part that are done before a position, such as 1.25."""
    counts: Mapping[str, int] = dict(zip(order.names, order.taken(position), strict=True))
    return {
        name: round(count / part.num_windows, 4)
        for (name, count), part in zip(counts.items(), order.parts, strict=True)
    }
