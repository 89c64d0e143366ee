"""`mm-train`: train a model on a dataset, and try it out.

Each command is made only when it is asked for, because its options live beside code that imports torch, which takes seconds;
`mm-train --help` does not.
"""

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_data.reporting import counted
from minimind_train.model.presets import PRESETS

from .options import Given, as_defaults, command, is_typed, make_app, plain, refuse_idle
from .talk import talk

if TYPE_CHECKING:
    from minimind_train.run.options import DataOptions, RunOptions

_FIRST = (
    *("shards", "run", "go_on", "allow_change", "_preset", "_config", "from_weight", "from_step"),
    *("epochs", "steps", "global_batch", "micro_batch", "seq_len", "layout", "learning_rate"),
    *("device", "nproc", "dtype", "seed"),
)
"""What most people set of a run: the help begins with it, and goes on with all the rest by its subject."""


def _pretrain(app: typer.Typer) -> None:
    """Pre-train a model, or resume a run."""
    from minimind_train.run.options import PretrainOptions

    _register_phase(app, PretrainOptions, _pretrain.__doc__)


def _use_preset(context: typer.Context, name: str | None) -> str | None:
    """Let a preset's options be the defaults of this command line, and count as given."""
    if name is not None:
        if name not in PRESETS:
            raise typer.BadParameter(f"{name}: the presets are {', '.join(PRESETS)}")
        context.default_map = {**(context.default_map or {}), **PRESETS[name]}
    return name


def _config_option(kind: "type[RunOptions]") -> Any:
    """Return the option whose file's options are the defaults of the command line, and count as given."""
    from minimind_data.options import leaves
    from minimind_train.run.toml import read_description

    names = [name for name, _, _ in leaves(kind)]

    def use(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None:
            try:
                options = read_description(path, kind.command, names)
            except ValueError as error:
                raise typer.BadParameter(str(error)) from None
            for flag, other in (("--steps", "epochs"), ("--epochs", "steps")):  # two words for one thing
                if is_typed(flag, context):
                    options.pop(other, None)
            context.default_map = {**as_defaults(options, context), **(context.default_map or {})}
        return path

    return typer.Option(
        "--config",
        metavar="TOML",
        is_eager=True,
        callback=use,
        help="TOML file with options, such as the run.toml in a run folder. Other options override it.",
    )


def _sft(app: typer.Typer) -> None:
    """Fine-tune a model on conversations.

    Supervised fine-tuning (SFT). With --resume, continue a run.
    """
    from minimind_train.run.options import SftOptions

    _register_phase(app, SftOptions, _sft.__doc__)


def _dpo(app: typer.Typer) -> None:
    """Train a model on pairs of better and worse answers.

    Direct preference optimization (DPO). With --resume, continue a run.
    """
    from minimind_train.run.options import DpoOptions

    _register_phase(app, DpoOptions, _dpo.__doc__)


def _register_phase(app: typer.Typer, kind: "type[RunOptions]", help_text: str | None) -> None:
    """Make the command of a kind of training: its options as flags, and what goes with `--resume`."""
    from minimind_data.options import flatten
    from minimind_train.run.entry import begin, resume
    from minimind_train.run.options import changeable
    from minimind_train.run_folder.record import WEIGHTS

    def run_command(
        config: Any,
        given: Given,
        go_on: Annotated[
            bool,
            typer.Option("--resume", help="Resume the run in the folder --run, with its own options."),
        ] = False,
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
        if reweight and not (go_on and "shards" in given):
            raise typer.BadParameter(
                "--reweight-at-resume goes with --resume and every part of the mixture as --shards NAME=DIR:WEIGHT"
            )
        if unknown := allowed - changeable(kind):
            raise typer.BadParameter(
                f"--allow-change {min(unknown)}: no option that may change, of which one stands behind each --allow-change; there are {', '.join(sorted(changeable(kind)))}"
            )
        if not go_on:
            _refuse_in_a_new_run(config.data, allowed, given)
        run = config.training.run
        if go_on:
            values = {name: value for name, value in flatten(config).items() if name in given}
            outcome = resume(
                run, values, command=kind.command, allow_change=allowed | ({WEIGHTS} if reweight else set())
            )
        else:
            outcome = begin(config, names_given=given)
        if outcome.rank:  # of several processes that torchrun started, the first says it for all
            raise typer.Exit(outcome.stopped_by or 0)
        if outcome.stopped_by:
            print(
                f"stopped by {outcome.stopped_by.what} after step {outcome.step} of {outcome.total_steps}, which is saved; "
                f"go on with: mm-train {kind.command} --run {shlex.quote(str(run))} --resume",
                file=sys.stderr,
            )
            raise typer.Exit(outcome.stopped_by)
        if outcome.loss is not None:
            print(
                f"{run}: done, {counted(outcome.step, 'step')}, last loss {outcome.loss:.4f}", file=sys.stderr
            )

    run_command.__annotations__["config"] = kind
    run_command.__doc__ = help_text
    command(app, kind.command, first=_FIRST)(run_command)


def _refuse_in_a_new_run(data: "DataOptions", allowed: set[str], given: Given) -> None:
    """Refuse what a run that begins can do nothing with.

    Raises:
        typer.BadParameter: it is there.
    """
    from minimind_train.run.options import NEEDS_SEQUENTIAL

    if allowed:
        raise typer.BadParameter("--allow-change goes with --resume; a new run has no options to differ from")
    if data.resume_from and data.order != "sequential":
        raise typer.BadParameter(NEEDS_SEQUENTIAL)
    refuse_idle(given, data.layout)


def _checkpoint_option(parse: Callable[[str], Any]) -> Any:
    return typer.Option(
        metavar="STEP|best",
        parser=plain(parse),
        help="Step of the checkpoint, or best, the one with the lowest validation loss; by default the "
        "newest.",
    )


def _generate(app: typer.Typer) -> None:
    """Generate text with a model, or chat with it."""
    from minimind_train.generation.chat_session import ChatSession
    from minimind_train.generation.completion import complete
    from minimind_train.generation.options import GenerateOptions
    from minimind_train.model.config import RopeScaling
    from minimind_train.run_folder.options import parse_step

    def run_command(
        run: Annotated[Path, typer.Option(help="Folder of the run, or a Hugging Face folder.")],
        options: GenerateOptions,
        scaling: RopeScaling,
        given: Given,
        prompt: Annotated[
            str | None, typer.Option(help="Text to continue; with --chat, a single question to answer.")
        ] = None,
        chat: Annotated[
            bool,
            typer.Option(
                "--chat",
                help="Chat in the terminal, or answer each line of standard input, with the chat template in the "
                "folder.",
            ),
        ] = False,
        system: Annotated[
            str | None, typer.Option(metavar="TEXT", help="With --chat: system prompt.")
        ] = None,
        checkpoint: Annotated[Any, _checkpoint_option(parse_step)] = None,
        device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    ) -> None:
        changes = {name: value for name, value in asdict(scaling).items() if name in given}
        if chat:
            conversation = ChatSession.open(
                run, options, system=system, step=checkpoint, device=device, changes=changes
            )
            talk(conversation, prompt)
            return
        if system is not None:
            raise typer.BadParameter("--system goes with --chat")
        if prompt is None:
            raise typer.BadParameter("--prompt says what to go on from; to talk with the model pass --chat")
        for text in complete(run, prompt, options, step=checkpoint, device=device, changes=changes):
            print(text, end="", flush=True)
        print()

    run_command.__doc__ = _generate.__doc__
    command(app, "generate")(run_command)


def _eval(app: typer.Typer) -> None:
    """Evaluate a model on a dataset: loss, perplexity, bits per byte."""
    from minimind_data.windows.base import Layout
    from minimind_train.model.config import Dtype, RopeScaling
    from minimind_train.run.evaluation import evaluate_run
    from minimind_train.run_folder.options import parse_step

    def run_command(
        run: Annotated[Path, typer.Option(help="Folder of the run, or a Hugging Face folder.")],
        shards: Annotated[list[Path], typer.Option(metavar="DIR", help="Dataset with the same tokenizer.")],
        scaling: RopeScaling,
        given: Given,
        seq_len: Annotated[
            int | None, typer.Option(min=1, help="Sequence length; by default that of the run.")
        ] = None,
        layout: Annotated[
            Layout | None, typer.Option(help="How windows are cut; by default as in the run.")
        ] = None,
        windows: Annotated[
            int | None,
            typer.Option(
                min=1, metavar="N", help="Number of windows, spread evenly over the dataset; by default all."
            ),
        ] = None,
        micro_batch: Annotated[
            int, typer.Option(min=1, max=2**20, help="Micro-batch size: windows in one pass.")
        ] = 32,
        checkpoint: Annotated[Any, _checkpoint_option(parse_step)] = None,
        device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
        dtype: Annotated[
            Dtype | None, typer.Option(help="Dtype of matrix products; by default that of the run.")
        ] = None,
        as_json: Annotated[
            bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")
        ] = False,
    ) -> None:
        if len(shards) > 1:
            raise typer.BadParameter(
                f"--shards stands there {len(shards)} times, and one dataset is measured at a time; call it for each"
            )
        (folder,) = shards
        cut = {"seq_len": seq_len, "layout": layout}
        found = evaluate_run(
            run,
            folder,
            step=checkpoint,
            num_windows=windows,
            batch=micro_batch,
            device=device,
            dtype=dtype,
            cut={name: value for name, value in cut.items() if value is not None},
            changes={name: value for name, value in asdict(scaling).items() if name in given},
        )
        if as_json:
            print(json.dumps(found.as_dict()))
        else:
            print(f"{folder}: {found}")

    run_command.__doc__ = _eval.__doc__
    command(app, "eval")(run_command)


def _export(app: typer.Typer) -> None:
    """Export a model for transformers, peft or MiniMind."""
    from minimind_train.run_folder.options import parse_step
    from minimind_train.weights.exporting import export
    from minimind_train.weights.options import Target, WeightDtype

    def run_command(
        run: Annotated[Path, typer.Option(help="Folder of the run.")],
        to: Annotated[
            Target,
            typer.Option(
                help="hf: a folder that transformers opens as Qwen3, Qwen3-MoE or Llama; minimind: a .pth that "
                "MiniMind's code opens; peft: only the adapters of a run with --lora-rank."
            ),
        ],
        out: Annotated[Path, typer.Option(help="A new folder; for minimind any folder, or the .pth itself.")],
        dtype: Annotated[
            WeightDtype | None,
            typer.Option(help="Dtype of the weights; by default fp16 for minimind, else fp32."),
        ] = None,
        checkpoint: Annotated[Any, _checkpoint_option(parse_step)] = None,
    ) -> None:
        export(run, out, to=to, step=checkpoint, dtype=dtype)

    run_command.__doc__ = _export.__doc__
    command(app, "export")(run_command)


def _plot(app: typer.Typer) -> None:
    """Plot the metrics of runs, as an HTML page or a picture."""
    from minimind_train.run_folder.options import Axis
    from minimind_train.run_folder.plot import draw

    def run_command(
        runs: Annotated[
            list[Path], typer.Argument(metavar="RUN", help="Folders of runs, which may still be training.")
        ],
        out: Annotated[
            list[Path] | None,
            typer.Option(
                metavar="FILE",
                help="File to write: .html for a page; .png, .svg or .pdf for a picture, which needs matplotlib. "
                "Repeatable; by default plot.html.",
            ),
        ] = None,
        x: Annotated[Axis, typer.Option(help="Horizontal axis of the curves.")] = "step",
    ) -> None:
        for file in out or [Path("plot.html")]:
            draw(runs, file, axis=x)
            print(file)

    run_command.__doc__ = _plot.__doc__
    command(app, "plot")(run_command)


_COMMANDS: dict[str, Callable[[typer.Typer], None]] = {
    "pretrain": _pretrain,
    "sft": _sft,
    "dpo": _dpo,
    "generate": _generate,
    "eval": _eval,
    "export": _export,
    "plot": _plot,
}


def _share_cores() -> None:
    """Let torch's CPU threads sleep soon when they wait for one another.

    GNU OpenMP spins for milliseconds by default. On a core that another process wants too, that is time in which the awaited
    thread cannot run: training beside one busy process came to a tenth of its speed, against half of it with short spins. On
    an idle machine a short spin costs a few per cent of a tiny model's speed. Must be set before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def make(arguments: Sequence[str]) -> typer.Typer:
    """Return the application for a command line: whole where it asks for a command, else enough to list them."""
    app = make_app("Train small language models on datasets made by mm-data.")
    app.callback()(lambda: None)
    wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, register in _COMMANDS.items():
        if name == wanted:
            register(app)
        else:
            app.command(name, help=register.__doc__)(lambda: None)
    return app


def main() -> None:
    """Run the command line of this process."""
    _share_cores()
    make(sys.argv[1:])()
