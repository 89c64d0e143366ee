"""`mm-train generate`, `serve`, `eval`, `export` and `plot`, the commands for a trained model. They import torch only when they run."""

import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from minimind_data.options import leaves
from minimind_data.windows.base import Layout
from minimind_train.batches.options import WindowOptions
from minimind_train.generation.options import GenerateOptions
from minimind_train.model.config import Dtype, ModelConfig, RopeScaling
from minimind_train.run_folder.options import Axis, parse_step
from minimind_train.training.options import TrainingOptions
from minimind_train.weights.options import Target, WeightDtype

from .entry import importing
from .flags import say_in_flags
from .options import AsJson, Changes, OptionsGiven, option_of, plain
from .talk import talk

_Checkpoint = Annotated[
    Any,
    typer.Option(
        metavar="STEP|best",
        parser=plain(parse_step),
        help="Step of the checkpoint, or best, the one with the lowest validation loss; by default the newest.",
    ),
]
_Run = Annotated[
    Path, typer.Option(help="Folder of the run, a Hugging Face folder, or a .pth, such as MiniMind's.")
]
_Tokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|DIR",
        help="Of a .pth: its tokenizer, a name or folder as in mm-data tokenize; by default the folder NAME_tokenizer "
        "beside it, else that of its generation of MiniMind.",
    ),
]
_Lora = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="MiniMind's lora_*.pth, whose adapters are merged into the weights."),
]
_Shape = Annotated[
    dict[str, Any],
    Changes(ModelConfig, without=frozenset({"dropout", *(name for name, _, _ in leaves(RopeScaling))})),
]
"""Options of the model that the tensors of a .pth do not tell; a folder says them itself."""
_OWN_ADDRESSES = {"127.0.0.1", "::1", "localhost"}
_Device = Annotated[str, option_of(TrainingOptions, "device")]


def generate(
    run: _Run,
    options: GenerateOptions,
    scaling: RopeScaling,
    shape: _Shape,
    options_given: OptionsGiven,
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
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="With --chat: system prompt.")] = None,
    thinking: Annotated[
        bool | None,
        typer.Option(
            "--thinking/--no-thinking",
            help="With --chat: let answers begin with reasoning or not (open_thinking, enable_thinking); by default as the chat "
            "template has it.",
        ),
    ] = None,
    tools: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --chat: JSON list of schemas of functions that the model may call; its calls are printed, nothing runs them.",
        ),
    ] = None,
    tokenizer: _Tokenizer = None,
    lora: _Lora = None,
    checkpoint: _Checkpoint = None,
    device: _Device = TrainingOptions.device,
) -> None:
    """Generate text with a model, or chat with it.

    Options of the model's shape are for a .pth, where its tensors do not tell them.
    """
    for flag, value in {"--system": system, "--thinking": thinking, "--tools": tools}.items():
        if value is not None and not chat:
            raise typer.BadParameter(f"{flag} goes with --chat")
    if prompt is None and not chat:
        raise typer.BadParameter(
            "--prompt is missing, the text to continue; to chat with the model pass --chat"
        )
    with importing():
        from minimind_data.chat.tools import read_tools
        from minimind_train.generation.chat_session import ChatSession
        from minimind_train.generation.completion import complete

    opening = {
        "checkpoint": checkpoint,
        "device": device,
        "changes": _changes(scaling, shape, options_given),
        "tokenizer": tokenizer,
        "lora": lora,
        "say": say_in_flags(),
    }
    if chat:
        functions = None if tools is None else read_tools(tools)
        session = ChatSession.open(run, options, system=system, tools=functions, thinking=thinking, **opening)
        talk(session, prompt)
        return
    assert prompt is not None
    texts = complete(run, prompt, options, **opening)
    try:
        for text in texts:
            print(text, end="", flush=True)
    finally:  # also where Ctrl-C stops it, so that what is said then begins a line
        print()


def serve(
    run: _Run,
    options: GenerateOptions,
    scaling: RopeScaling,
    shape: _Shape,
    options_given: OptionsGiven,
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS", help="Address to listen on; 0.0.0.0 for all addresses of this machine."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(metavar="N", min=0, max=65535, help="Port to listen on; 0 lets the system pick one."),
    ] = 8000,
    tokenizer: _Tokenizer = None,
    lora: _Lora = None,
    checkpoint: _Checkpoint = None,
    device: _Device = TrainingOptions.device,
) -> None:
    """Serve a model to clients of OpenAI's API, and to a browser.

    It computes one answer at a time, for trying a model out; for many users, export the model and use vLLM. The sampling options
    apply where a request does not set its own; those of the model's shape are for a .pth whose tensors do not show it.
    """
    with importing():
        from minimind_train.generation.server import ServedModel, listen
        from minimind_train.generation.server import serve as serve_model

    with listen(host, port) as listener:
        served = ServedModel.open(
            run,
            options,
            checkpoint=checkpoint,
            device=device,
            changes=_changes(scaling, shape, options_given),
            tokenizer=tokenizer,
            lora=lora,
            say=say_in_flags(),
        )
        if host not in _OWN_ADDRESSES:
            print(f"{host} can be reached from other machines, and there is no password", file=sys.stderr)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        print(
            f"{served.name}: chat in a browser at {address}, or with any client of OpenAI's API at {address}/v1; Ctrl-C ends it",
            file=sys.stderr,
        )
        with contextlib.suppress(KeyboardInterrupt):
            serve_model(served, listener)


def evaluate(
    run: _Run,
    shards: Annotated[list[Path], typer.Option(metavar="DIR", help="Dataset with the same tokenizer.")],
    scaling: RopeScaling,
    shape: _Shape,
    options_given: OptionsGiven,
    seq_len: Annotated[
        int | None, option_of(WindowOptions, "seq_len", min=1, default="that of the run")
    ] = None,
    layout: Annotated[Layout | None, option_of(WindowOptions, "layout", default="that of the run")] = None,
    windows: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Number of windows, spread evenly over the dataset; by default all."
        ),
    ] = None,
    micro_batch: Annotated[
        int, option_of(TrainingOptions, "micro_batch", min=1, max=2**20)
    ] = TrainingOptions.micro_batch,
    tokenizer: _Tokenizer = None,
    lora: _Lora = None,
    checkpoint: _Checkpoint = None,
    device: _Device = TrainingOptions.device,
    dtype: Annotated[Dtype | None, option_of(TrainingOptions, "dtype", default="that of the run")] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a model on a dataset: loss, perplexity, bits per byte.

    Options of the model's shape are for a .pth, where its tensors do not tell them.
    """
    if len(shards) > 1:
        raise typer.BadParameter(
            f"--shards is given {len(shards)} times, but one dataset is evaluated at a time; run the command for each"
        )
    with importing():
        from minimind_train.run.evaluation import evaluate as evaluate_run

    (folder,) = shards
    evaluation = evaluate_run(
        run,
        folder,
        checkpoint=checkpoint,
        windows=windows,
        micro_batch=micro_batch,
        device=device,
        dtype=dtype,
        seq_len=seq_len,
        layout=layout,
        changes=_changes(scaling, shape, options_given),
        tokenizer=tokenizer,
        lora=lora,
        say=say_in_flags(),
    )
    if as_json:
        print(json.dumps(evaluation.as_dict()))
    else:
        print(f"{folder}: {evaluation}")


def export(
    run: _Run,
    to: Annotated[
        Target,
        typer.Option(
            help="hf: a folder that transformers opens as Qwen3, Qwen3-MoE or Llama; minimind: a .pth that "
            "MiniMind's code opens; gguf: a file for llama.cpp and ollama; peft, minimind-lora: only the adapters of a run with --lora-rank, "
            "for peft, or as MiniMind's lora_*.pth."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="A new folder; for minimind and gguf any folder, or the .pth or .gguf itself."),
    ],
    scaling: RopeScaling,
    shape: _Shape,
    options_given: OptionsGiven,
    dtype: Annotated[
        WeightDtype | None,
        typer.Option(
            help="Dtype of the weights; by default fp16 for MiniMind and gguf, else fp32. q8_0 is for gguf."
        ),
    ] = None,
    tokenizer: _Tokenizer = None,
    lora: _Lora = None,
    checkpoint: _Checkpoint = None,
) -> None:
    """Export a model for transformers, llama.cpp, peft or MiniMind.

    Options of the model's shape are for a .pth, where its tensors do not tell them.
    """
    with importing():
        from minimind_train.weights.exporting import export as export_weights

    export_weights(
        run,
        out,
        to=to,
        checkpoint=checkpoint,
        dtype=dtype,
        changes=_changes(scaling, shape, options_given),
        tokenizer=tokenizer,
        lora=lora,
        say=say_in_flags(),
    )


def _changes(scaling: RopeScaling, shape: dict[str, Any], options_given: OptionsGiven) -> dict[str, Any]:
    """Return the options of the model that the user passed."""
    return shape | {name: value for name, value in asdict(scaling).items() if name in options_given}


def plot(
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
    """Plot the metrics of runs, as an HTML page or a picture."""
    with importing():
        from minimind_train.run_folder.plot import draw

    for file in out or [Path("plot.html")]:
        draw(runs, file, axis=x)
        print(file)
