"""`mm-train`: train a model on a dataset, and use it.

The options of a run are in modules that do not import torch, which takes seconds. The code of a run is imported when it begins, so help
and wrong usage are answered at once.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from minimind_data.options import flatten, leaves
from minimind_data.reporting import counted
from minimind_train.batches.options import NEEDS_SEQUENTIAL, DataOptions
from minimind_train.model.presets import PRESETS
from minimind_train.run.options import (
    DpoOptions,
    PretrainOptions,
    RunOptions,
    SftOptions,
    changeable,
)
from minimind_train.run.toml import read_description, typed_options, with_present_places_of_run

from . import models
from .entry import importing
from .flags import in_flags, say_in_flags
from .options import OptionsGiven, as_defaults, command, is_typed, make_app, refuse_idle

app = make_app("Train small language models on datasets made by mm-data.")

_FIRST = (
    *("shards", "run", "go_on", "allow_change", "_preset", "_config", "from_weight", "from_step"),
    *("epochs", "steps", "global_batch", "micro_batch", "seq_len", "layout", "learning_rate"),
    *("device", "nproc", "dtype", "seed"),
)
"""The options that most people set. They come first in the help; the rest follows by subject."""


def _use_preset(context: typer.Context, name: str | None) -> str | None:
    """Make the options of a preset the defaults of this command line; they count as passed by the user."""
    if name is not None:
        if name not in PRESETS:
            raise typer.BadParameter(f"{name}: no such preset; there are {', '.join(PRESETS)}")
        context.default_map = {**(context.default_map or {}), **PRESETS[name]}
    return name


def _config_option(kind: type[RunOptions]) -> Any:
    """Return the option --config: the options in its file become defaults, and count as passed by the user."""
    names = [name for name, _, _ in leaves(kind)]

    def use(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None:
            try:
                options = read_description(path, kind.command, names)
                options = with_present_places_of_run(path, options, say_in_flags())
                defaults = typed_options(path, as_defaults(options, context), kind)
            except ValueError as error:
                raise typer.BadParameter(str(error)) from None
            except typer.BadParameter as error:
                raise typer.BadParameter(f"{path}: {error.message}") from None
            for flag, other in (("--steps", "epochs"), ("--epochs", "steps")):  # each replaces the other
                if is_typed(flag, context):
                    defaults.pop(other, None)
            context.default_map = {**defaults, **(context.default_map or {})}
        return path

    return typer.Option(
        "--config",
        metavar="TOML",
        is_eager=True,
        callback=use,
        help="TOML file with options, such as the run.toml in a run folder. Other options override it.",
    )


def _register(kind: type[RunOptions], help_text: str) -> None:
    """Make the command of a phase: its options as flags, and what goes with `--resume`."""

    def train(
        config: Any,
        options_given: OptionsGiven,
        go_on: Annotated[
            Literal["always", "auto"] | None,
            typer.Option(
                "--resume",
                metavar="[auto]",
                help="Resume the run in the folder --run, with its own options. --resume auto: resume the "
                "run if there is one, else begin it.",
            ),
        ] = None,
        allow_change: Annotated[
            list[str] | None,
            typer.Option(
                metavar="NAME",
                help="With --resume: name of an option that may change from here on. Repeatable.",
            ),
        ] = None,
        reweight: Annotated[
            bool,
            typer.Option(
                "--reweight-at-resume",
                help="With --resume and --shards: new weights for the parts of the mixture from here on; each "
                "part continues where it is.",
            ),
        ] = False,
        _config: Annotated[Path | None, _config_option(kind)] = None,
        _preset: Annotated[
            str | None,
            typer.Option(
                "--preset",
                metavar="NAME",
                is_eager=True,
                callback=_use_preset,
                help=f"A published model size: {', '.join(PRESETS)}. Other options override it.",
            ),
        ] = None,
    ) -> None:
        allowed = {name.lstrip("-").replace("-", "_") for name in allow_change or ()}
        if reweight and not (go_on == "always" and "shards" in options_given):
            raise typer.BadParameter(
                "--reweight-at-resume needs --resume, and every part of the mixture as --shards NAME=DIR:WEIGHT"
            )
        if unknown := allowed - changeable(kind):
            raise typer.BadParameter(
                f"--allow-change {min(unknown)}: not an option that may change; name one of {', '.join(sorted(changeable(kind)))}"
            )
        if go_on != "always":
            _refuse_in_a_new_run(config.data, set() if go_on else allowed, options_given)
        with importing():
            from minimind_train.run.entry import begin, begin_or_resume, resume

        run = config.training.run
        if go_on == "auto":
            names_given = options_given & flatten(config).keys()
            outcome = begin_or_resume(config, say_in_flags(), names_given=names_given, allow_change=allowed)
        elif go_on:
            values = {name: value for name, value in flatten(config).items() if name in options_given}
            outcome = resume(
                run,
                values,
                command=kind.command,
                allow_change=allowed,
                reweight=reweight,
                say=say_in_flags(),
            )
        else:
            outcome = begin(config, say_in_flags(), names_given=options_given)
        if outcome.rank:  # under torchrun, rank 0 prints for all
            raise typer.Exit(outcome.stopped_by or 0)
        if outcome.stopped_by:
            print(
                f"stopped by {in_flags(outcome.stopped_by.what)} after step {outcome.step} of {outcome.total_steps}, which is saved; "
                f"go on with: mm-train {kind.command} --run {shlex.quote(str(run))} --resume",
                file=sys.stderr,
            )
            raise typer.Exit(outcome.stopped_by)
        if outcome.loss is not None:
            print(
                f"{run}: done, {counted(outcome.step, 'step')}, last loss {outcome.loss:.4f}", file=sys.stderr
            )

    train.__annotations__["config"] = kind
    train.__doc__ = help_text
    command(app, kind.command, first=_FIRST)(train)


def _refuse_in_a_new_run(data: DataOptions, allowed: set[str], options_given: OptionsGiven) -> None:
    """Refuse options that do nothing in a new run.

    Raises:
        typer.BadParameter: there is one.
    """
    if allowed:
        raise typer.BadParameter("--allow-change is for --resume; a new run has no earlier options")
    if data.resume_from and data.order != "sequential":
        raise typer.BadParameter(in_flags(NEEDS_SEQUENTIAL))
    refuse_idle(options_given, data.layout)


_register(PretrainOptions, "Pre-train a model, or resume a run.")
_register(
    SftOptions,
    "Fine-tune a model on conversations.\n\nSupervised fine-tuning (SFT). With --resume, continue a run.",
)
_register(
    DpoOptions,
    "Train a model on pairs of better and worse answers.\n\nDirect preference optimization (DPO). With --resume, continue a run.",
)
command(app, first=("run", "prompt", "chat", "system", "tokenizer", "lora"))(models.generate)
command(app, first=("run", "host", "port", "tokenizer", "lora"))(models.serve)
command(app, "eval", first=("run", "shards", "tokenizer", "lora"))(models.evaluate)
command(app, first=("run", "to", "out", "dtype", "tokenizer", "lora"))(models.export)
command(app)(models.plot)


def _share_cores() -> None:
    """Let torch's CPU threads sleep soon when they wait for one another.

    By default GNU OpenMP spins for milliseconds. On a core that another process uses too, the awaited thread cannot run in that
    time: beside one busy process, training ran at a tenth of its speed, and at half of it with short spins. On an idle machine
    a short spin costs a tiny model a few per cent of its speed. This must be set before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def main() -> None:
    """Run the command line of this process."""
    _share_cores()
    app()
