"""Text from a run: its newest whole checkpoint, its tokenizer, and a prompt."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from minimind_data.errors import UserError
from minimind_train.devices import resolve_device
from minimind_train.generate import GenerateOptions, generate, stream_text
from minimind_train.progress import Say, say_on_stderr
from minimind_train.runs import RunRecord, load_run_tokenizer
from minimind_train.trained import Which, model_of


def complete(
    run: Path,
    prompt: str,
    options: GenerateOptions,
    *,
    step: Which = None,
    device: str = "auto",
    changes: Mapping[str, Any] = MappingProxyType({}),
    say: Say = say_on_stderr,
) -> Iterator[str]:
    """Yield what the model of a run writes after BOS and `prompt`, piece by piece.

    Args:
        run: the run folder; a run that is still training may be asked too.
        prompt: special tokens in it are recognised.
        options: how tokens are chosen.
        step: whose checkpoint; the newest whole one by default, or `best`.
        device: where to compute.
        changes: options of the model that are to differ from the run's, such as those of its positions.
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
    model = model_of(run, step=step, say=say, changes=changes).to(resolve_device(device))
    tokenizer = load_run_tokenizer(run, info).reference
    prompt_ids = [info.bos_id, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    return stream_text(tokenizer, generate(model, prompt_ids, options=options, eos_id=info.eos_id))
