"""`mm-data locate`: which window a run reads at a position, and where it is."""

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from minimind_data.errors import UserError
from minimind_data.permutation import MAX_SEED
from minimind_data.windows.base import Layout, LongDocuments
from minimind_train.batches.options import DataOptions, OrderOptions, WindowOptions, read_sources
from minimind_train.order.sample_order import OrderKind
from minimind_train.order.skips import Skips
from minimind_train.training.options import TrainingOptions

from .flags import say_in_flags
from .options import AsJson, OptionsGiven, option_of, refuse_idle

_MAX_INT64 = 2**63 - 1


def locate(
    options_given: OptionsGiven,
    position: Annotated[int, typer.Option(help="Samples consumed since the run began.")],
    folders: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DIR",
            help="Folder of the dataset; of a mixture, each NAME=DIR:WEIGHT, as for mm-train pretrain --shards.",
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a run, in place of DIR and the options of the order: what the run reads there, "
            "with all its changes."
        ),
    ] = None,
    seq_len: Annotated[int | None, option_of(WindowOptions, "seq_len")] = None,
    layout: Annotated[Layout, option_of(WindowOptions, "layout")] = WindowOptions.layout,
    long_documents: Annotated[
        LongDocuments, option_of(WindowOptions, "long_documents")
    ] = WindowOptions.long_documents,
    order: Annotated[OrderKind, option_of(OrderOptions, "order")] = OrderOptions.order,
    shuffle_block: Annotated[
        int, option_of(OrderOptions, "shuffle_block", min=1)
    ] = OrderOptions.shuffle_block,
    seed: Annotated[int, option_of(TrainingOptions, "seed")] = TrainingOptions.seed,
    as_json: AsJson = False,
) -> None:
    """Show which window is at a position, and where."""
    from minimind_train.batches.datasets import Datasets
    from minimind_train.batches.positions import window_at
    from minimind_train.run.location import data_at

    if not 0 <= position <= _MAX_INT64:
        raise UserError(f"--position counts samples, from 0 to 2^63 - 1, not {position}")
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"--seed must be from 0 to 2^64 - 1, not {seed}")
    if run:
        _refuse_beside_run(options_given - {"run", "position", "as_json"})
        data, seed = data_at(run, position)
    elif not folders or seq_len is None:
        raise typer.BadParameter("pass DIR and --seq-len, or --run with the folder of a run")
    else:
        refuse_idle(options_given, layout)
        try:
            read_sources(folders)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        try:
            data = DataOptions(
                shards=tuple(folders),
                layout=layout,
                long_documents=long_documents,
                seq_len=seq_len,
                order=order,
                shuffle_block=shuffle_block,
            )
        except ValueError as error:
            raise UserError(str(error)) from None
    datasets = Datasets.open(data.shards)
    windows, ordered = datasets.windows_and_order(data, seed=seed, say=say_in_flags())
    skips = Skips.of(data.skip_positions)
    place = window_at(ordered, windows, position) | (
        {"left_out": True} if not skips.count(position, position + 1) else {}
    )
    if as_json:
        print(json.dumps({"position": position, **place}, ensure_ascii=False))
        return
    part, whole = (f"part {place['part']}, ", "") if "part" in place else ("", f" of {len(windows):,}")
    print(
        f"position {position:,}: {part}epoch {place['epoch']}, window {place['window']:,}{whole}, "
        f"shard {place['shard']}, offset {place['offset']:,}{', left out' if 'left_out' in place else ''}"
    )
    folder = {source.name: source.folder for source in datasets.sources}[place.get("part", "")]
    print(f"show it with: {_window_command(folder, place['window'], data)}")


def _refuse_beside_run(names: frozenset[str]) -> None:
    """Refuse options that a run leaves no room for.

    Raises:
        typer.BadParameter: there are some.
    """
    if names:
        quoted_names = ", ".join(
            "DIR" if name == "folders" else f"--{name.replace('_', '-')}" for name in sorted(names)
        )
        raise typer.BadParameter(f"--run already decides the order; leave out {quoted_names}")


def _window_command(folder: Path, window: int, data: WindowOptions) -> str:
    """Return the command that shows a window."""
    words = ["mm-data", "window", str(folder), str(window)]
    words += ["--seq-len", str(data.seq_len), "--layout", data.layout]
    if data.layout == "pack":
        words += ["--long-documents", data.long_documents]
    return shlex.join(words)
