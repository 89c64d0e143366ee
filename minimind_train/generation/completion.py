"""Continue a text with a trained model, from a run folder, a Hugging Face folder or a `.pth`: `mm-train generate` without `--chat`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from minimind_data.errors import UserError
from minimind_data.tokenizer.loading import Tokenizer
from minimind_train.generation.options import DEFAULTS, GenerateOptions
from minimind_train.generation.sampling import generate, stream_text
from minimind_train.model.transformer import MiniMind
from minimind_train.parallel.devices import resolve_device
from minimind_train.progress import Say, say_on_stderr
from minimind_train.run_folder.options import CheckpointChoice
from minimind_train.weights.loading import open_model


def complete(
    run: Path | str,
    prompt: str,
    options: GenerateOptions = DEFAULTS,
    *,
    checkpoint: CheckpointChoice = None,
    device: str = "auto",
    changes: Mapping[str, Any] = MappingProxyType({}),
    tokenizer: Path | str | None = None,
    lora: Path | str | None = None,
    say: Say = say_on_stderr,
) -> Iterator[str]:
    """Yield what the model of a run generates after BOS, where its tokenizer has one, and `prompt`, piece by piece.

    Args:
        run: the folder of a run, which may still be training, a Hugging Face folder, or MiniMind's `.pth`.
        prompt: the text to continue; special tokens in it are recognised.
        options: of sampling.
        checkpoint: the step of one, or `best`; by default the newest whole one.
        device: where to compute.
        changes: options of the model: those that are to differ, such as those of its positions, or that a `.pth` does not tell.
        tokenizer: of weights that are no run's, where it is not beside them or MiniMind's own.
        lora: a file of MiniMind's adapters, which are merged into the weights.
        say: called with a sentence about each damaged checkpoint, and on what a `.pth` was taken for.

    Raises:
        UserError: there is no such model or checkpoint.
    """
    _check(prompt)
    trained = open_model(Path(run), step=checkpoint, say=say, changes=changes, tokenizer=tokenizer, lora=lora)
    return continue_text(trained.model.to(resolve_device(device)), trained.tokenizer, prompt, options)


def continue_text(
    model: MiniMind, tokenizer: Tokenizer, prompt: str, options: GenerateOptions = DEFAULTS
) -> Iterator[str]:
    """Yield what a model generates after BOS, where its tokenizer has one, and `prompt`, piece by piece.

    Args:
        model: in evaluation mode, where it is to compute.
        tokenizer: the model's.
        prompt: the text to continue; special tokens in it are recognised.
        options: of sampling.

    Raises:
        UserError: the prompt has no token, or too many, or is no text.
    """
    _check(prompt)
    prompt_ids = tokenizer.prompt_ids(prompt)
    if not prompt_ids:
        raise UserError(
            "`prompt` has no token, and the tokenizer no BOS that a text could begin with",
            remedy="pass a text to continue",
            option="prompt",
        )
    ids = generate(model, prompt_ids, options=options, eos_id=tokenizer.info.eos_id)
    return stream_text(tokenizer.reference, ids)


def _check(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(
            "`prompt`: holds bytes that are no text in this terminal's encoding",
            remedy="pass UTF-8",
            option="prompt",
        ) from None
