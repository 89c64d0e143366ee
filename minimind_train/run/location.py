"""What a run reads at a position, by its folder. Imports no torch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from minimind_data.errors import UserError
from minimind_train.batches.datasets import Datasets
from minimind_train.batches.options import DataOptions
from minimind_train.batches.positions import window_at
from minimind_train.order.skips import Skips
from minimind_train.progress import say_on_stderr
from minimind_train.run.options import options_of
from minimind_train.run_folder.places import with_present_places
from minimind_train.run_folder.record import RESTORE, RUN_CONFIG_NAME, RunRecord

__all__ = ["data_at", "locate"]


def data_at(run: Path, position: int) -> tuple[DataOptions, int]:
    """Return what a run reads, as it was at a position, and the seed of its order.

    Raises:
        UserError: there is no such run.
    """
    record = with_present_places(RunRecord.read(run), run, say_on_stderr, names=("shards",))
    options = options_of(record, run)
    try:
        data = replace(options.data, skip_positions=record.skip_positions_at(position))
    except ValueError as error:
        raise UserError(f"edited or damaged ({error})", where=run / RUN_CONFIG_NAME, remedy=RESTORE) from None
    return data, options.training.seed


def locate(run: Path | str, position: int) -> dict[str, Any]:
    """Say which window a run reads at a position, and where it is.

    Args:
        run: its folder.
        position: samples from the beginning of the run, across its epochs.

    Returns:
        `epoch`, `window`, `shard`, `offset` of its first token; of a mixture also the `part`, of which the others are then; and
        `left_out` where the run leaves the position out.

    Raises:
        UserError: there is no such run, or its dataset is not where it was.
    """
    data, seed = data_at(Path(run), position)
    windows, order = Datasets.open(data.shards).windows_and_order(data, seed=seed, say=say_on_stderr)
    place = window_at(order, windows, position)
    is_kept = Skips.of(data.skip_positions).count(position, position + 1)
    return place if is_kept else place | {"left_out": True}
