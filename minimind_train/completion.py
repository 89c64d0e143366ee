"""Text from a run: its newest whole checkpoint, its tokenizer, and a prompt."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from minimind_data.errors import UserError
from minimind_data.options import build
from minimind_train import checkpoint
from minimind_train.checkpoint import Checkpoint, GoneCheckpointError
from minimind_train.devices import resolve_device
from minimind_train.generate import GenerateOptions, generate, stream_text
from minimind_train.model import MiniMind, ModelConfig
from minimind_train.progress import Say, say_on_stderr
from minimind_train.runs import RunRecord, load_run_tokenizer

_MAX_TRIES = 5


def complete(
    run: Path,
    prompt: str,
    options: GenerateOptions,
    *,
    step: int | None = None,
    device: str = "auto",
    say: Say = say_on_stderr,
) -> Iterator[str]:
    """Yield what the model of a run writes after BOS and `prompt`, piece by piece.

    Args:
        run: the run folder; a run that is still training may be asked too.
        prompt: special tokens in it are recognised.
        options: how tokens are chosen.
        step: whose checkpoint; the newest whole one by default.
        device: where to compute.
        say: is told of damaged checkpoints.

    Raises:
        UserError: there is no such run or checkpoint.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(
            "--prompt: holds bytes that are no text in this terminal's encoding; pass UTF-8"
        ) from None
    info = RunRecord.read(run).tokenizer
    model = _newest_model_patiently(run, say) if step is None else _restored(checkpoint.load(run, step))
    model.to(resolve_device(device))
    tokenizer = load_run_tokenizer(run, info).reference
    prompt_ids = [info.bos_id, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    return stream_text(tokenizer, generate(model, prompt_ids, options=options, eos_id=info.eos_id))


def _newest_model_patiently(run: Path, say: Say) -> MiniMind:
    """Return the newest model of a run, which may be training, and may delete a checkpoint that is being read."""
    for _ in range(_MAX_TRIES - 1):
        with contextlib.suppress(GoneCheckpointError):
            return _newest_model(run, say)
    return _newest_model(run, say)


def _newest_model(run: Path, say: Say) -> MiniMind:
    found = checkpoint.load_latest(run, say)
    if found is None:
        raise UserError(
            f"{run}: no checkpoint yet; the first comes after --save-every steps, or when the run ends"
        )
    return _restored(found)


def _restored(found: Checkpoint) -> MiniMind:
    model = MiniMind(build(ModelConfig, found.state.config)).eval()
    found.restore(model)
    return model
