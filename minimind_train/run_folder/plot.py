"""Curves of runs, side by side: a page of HTML that needs nothing else, or a picture drawn by matplotlib.

The data are those of `metrics.jsonl`, also of runs that are still training. The page is one file that loads nothing (see
`minimind_data.html`); it shows values under the pointer, hides runs and changes the axis.
"""

import io
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from minimind_data.dataset.occupancy import refuse_replacing
from minimind_data.errors import UserError
from minimind_data.files import write_atomic
from minimind_data.html import fill, is_page, read_template
from minimind_data.options import options_in_file
from minimind_train.batches.options import WindowOptions
from minimind_train.run_folder.metrics import FILE_NAME, read_metrics
from minimind_train.run_folder.options import Axis
from minimind_train.run_folder.record import RESTORE, RUN_CONFIG_NAME, RunRecord

_TEMPLATE_NAME = "plot.html"
_PICTURES = (".png", ".svg", ".pdf")
_MAX_POINTS = 4000
"""Points of a run at most; more than a screen has columns would only make the page slow."""

_PANELS = {
    "loss": "Loss",
    "lr": "Learning rate",
    "tokens_per_second": "Tokens a second",
    "grad_norm": "Gradient norm",
    "auxiliary_loss": "Auxiliary loss",
}
_DASHED = {"loss": "val_loss"}
"""For each panel the metric that is drawn over it, dashed, where runs have it."""
_NO_CURVES = frozenset({"step", "position", "epoch", "targets", "offset", "loss_scale", "skipped_steps"})


@dataclass(frozen=True, kw_only=True)
class Curves:
    """The curves of one run; all lists have one entry for each line of metrics, None where the line lacks the value."""

    name: str
    x: dict[Axis, list[int]]
    y: dict[str, list[float | None]]
    lines: int
    """How many lines of metrics the run has; at most `_MAX_POINTS` of them are drawn, evenly spaced."""


def read_curves(runs: Sequence[Path]) -> list[Curves]:
    """Read the curves of several runs.

    Raises:
        UserError: a folder is no run, or has no metrics yet.
    """
    names = [run.absolute().name for run in runs]
    return [
        _read(run, name if names.count(name) == 1 else str(run))
        for run, name in zip(runs, names, strict=True)
    ]


def _read(run: Path, name: str) -> Curves:
    options = RunRecord.read(run).options
    seq_len = options_in_file(WindowOptions, options, run / RUN_CONFIG_NAME, remedy=RESTORE).seq_len
    lines = [record for record in read_metrics(run / FILE_NAME) if "position" in record]
    if not lines:
        raise UserError(
            "no line of metrics yet",
            where=run,
            remedy="the first comes with the first step, others every `log_every` steps",
            option="log_every",
        )
    stride = -(-len(lines) // _MAX_POINTS)
    # Validations are rare, so none of them is left out.
    chosen = [
        line for i, line in enumerate(lines) if i % stride == 0 or i == len(lines) - 1 or "val_loss" in line
    ]
    metrics = sorted(
        {metric for line in chosen for metric, value in line.items() if _is_curve(metric, value)}
    )
    return Curves(
        name=name,
        x={
            "step": [line["step"] for line in chosen],
            "tokens": [line["position"] * seq_len for line in chosen],
            "position": [line["position"] for line in chosen],
        },
        y={
            metric: [value if _is_curve(metric, value := line.get(metric)) else None for line in chosen]
            for metric in metrics
        },
        lines=len(lines),
    )


def _is_curve(metric: str, value: Any) -> bool:
    has_curve = metric not in _NO_CURVES and (not metric.startswith("val_") or metric in _DASHED.values())
    return has_curve and type(value) in (int, float) and abs(value) <= sys.float_info.max


def panels_of(curves: Sequence[Curves]) -> list[tuple[str, str, str | None]]:
    """Return (metric, title, metric drawn over it or None) of each panel: the usual ones, then all others that the runs have."""
    present = {metric for one in curves for metric in one.y}
    more = sorted(present - _PANELS.keys() - set(_DASHED.values()))
    titles = _PANELS | {metric: metric.replace("_", " ").capitalize() for metric in more}
    return [
        (metric, title, over if (over := _DASHED.get(metric)) in present else None)
        for metric, title in titles.items()
        if metric in present
    ]


def draw(runs: Sequence[Path], out: Path, *, axis: Axis = "step") -> None:
    """Draw the curves of runs into a file, a page or a picture by its suffix; it is written whole or not at all.

    Raises:
        UserError: a run cannot be read, the suffix is unknown, a file of something else would be overwritten, or matplotlib is missing.
    """
    if out.suffix.lower() not in {".html", *_PICTURES}:
        raise UserError(
            f"`out` {out}: the suffix says what to draw, a page (.html) or a picture ({', '.join(_PICTURES)})",
            option="out",
        )
    if not out.absolute().parent.is_dir() or out.is_dir():
        raise UserError(
            f"`out` {out}: no place for a file", remedy="make the folder, or name another one", option="out"
        )
    refuse_replacing(out, "out", is_ours=_is_drawn_here)
    curves = read_curves(runs)
    write_atomic(out, _page(curves, axis) if out.suffix.lower() == ".html" else _picture(curves, axis, out))


def _is_drawn_here(path: Path) -> bool:
    """Tell whether a file is a page made here or a picture of matplotlib's, which a newer one may replace."""
    return is_page(path) or (path.suffix.lower() in _PICTURES and b"matplotlib" in path.read_bytes().lower())


def _page(curves: Sequence[Curves], axis: Axis) -> str:
    data = {
        "axes": list(get_args(Axis)),
        "axis": axis,
        "panels": panels_of(curves),
        "runs": [
            {"name": one.name, "x": one.x, "y": one.y, "lines": one.lines, "points": len(one.x["step"])}
            for one in curves
        ],
    }
    return fill(read_template("minimind_train.run_folder", _TEMPLATE_NAME), data)


def _picture(curves: Sequence[Curves], axis: Axis, out: Path) -> bytes:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - an extra
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise UserError(
            f"`out` {out}: pictures need matplotlib",
            remedy=f"pip install 'minimind-pipeline[plot]', or take a page, `out` {out.with_suffix('.html')}, "
            "which needs nothing",
            option="out",
        ) from None
    panels = panels_of(curves)
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(12, 3.4 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (metric, title, over) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, 2, number, title=title, xlabel=axis)
        axes.grid(alpha=0.25)
        for place, one in enumerate(curves):
            color = f"C{place % 10}"
            _draw_line(axes, one, axis, metric, color=color, label=one.name)
            if over:
                _draw_line(axes, one, axis, over, color=color, linestyle="--", marker=".")
        if over:
            axes.plot([], [], color="gray", linestyle="--", marker=".", label="validation")
        axes.legend(fontsize="small")
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # a name may have characters that matplotlib's font lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        figure.savefig(buffer, format=out.suffix.lower().removeprefix("."), dpi=120)
    return buffer.getvalue()


def _draw_line(axes: Any, one: Curves, axis: Axis, metric: str, **style: Any) -> None:
    points = [(x, y) for x, y in zip(one.x[axis], one.y.get(metric, []), strict=False) if y is not None]
    if points:
        axes.plot(*zip(*points, strict=True), linewidth=1.3, **style)
