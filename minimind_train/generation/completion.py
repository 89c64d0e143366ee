"""Continue a text with a trained model, from a run folder or a Hugging Face folder: `mm-train generate` without `--chat`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from minimind_data.errors import UserError
from minimind_train.generation.options import GenerateOptions
from minimind_train.generation.sampling import generate, stream_text
from minimind_train.parallel.devices import resolve_device
from minimind_train.progress import Say, say_on_stderr
from minimind_train.run_folder.options import CheckpointChoice
from minimind_train.weights.loading import open_model


def complete(
    run: Path,
    prompt: str,
    options: GenerateOptions,
    *,
    step: CheckpointChoice = None,
    device: str = "auto",
    changes: Mapping[str, Any] = MappingProxyType({}),
    say: Say = say_on_stderr,
) -> Iterator[str]:
    """Yield what the model of a run generates after BOS and `prompt`, piece by piece.

    Args:
        run: the folder of a run, which may still be training, or a Hugging Face folder.
        prompt: the text to continue; special tokens in it are recognised.
        options: of sampling.
        step: of the checkpoint, or `best`; by default the newest whole one.
        device: where to compute.
        changes: options of the model that are to differ from the run's, such as those of its positions.
        say: called with a sentence about each damaged checkpoint.

    Raises:
        UserError: there is no such model or checkpoint.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(
            "`prompt`: holds bytes that are no text in this terminal's encoding",
            remedy="pass UTF-8",
            option="prompt",
        ) from None
    trained = open_model(run, step=step, say=say, changes=changes)
    model, info = trained.model.to(resolve_device(device)), trained.tokenizer.info
    tokenizer = trained.tokenizer.reference
    prompt_ids = [info.bos_id, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    return stream_text(tokenizer, generate(model, prompt_ids, options=options, eos_id=info.eos_id))
