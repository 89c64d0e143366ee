"""One token after another from a trained model, and text out of them as they come.

Knows models, ids and tokenizers; not run folders, files or prompts' templates.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from tokenizers import Tokenizer
from torch import Tensor

from minimind_data.errors import UserError
from minimind_train.model.transformer import KVCache, MiniMind


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How the next token is chosen; the defaults are MiniMind's, but for the length."""

    max_new_tokens: Annotated[int, "Maximum new tokens; the text may end earlier."] = 512
    temperature: Annotated[
        float, "Sampling temperature; higher is more varied, 0 always takes the most likely token."
    ] = 0.85
    top_p: Annotated[
        float, "Top-p: sample from the most likely tokens that together reach this probability."
    ] = 0.85
    top_k: Annotated[
        int, "Top-k: sample from at most this many of the most likely tokens; 0 for no limit."
    ] = 50
    seed: Annotated[int, "Random seed; the same seed gives the same text."] = 42

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, not {self.seed}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 or more, not {self.top_k}")


def generate(
    model: MiniMind, prompt_ids: Sequence[int], *, options: GenerateOptions, eos_id: int | None
) -> Iterator[int]:
    """Yield the ids that follow `prompt_ids`, each as soon as it is chosen.

    Ends before `eos_id`, after `max_new_tokens`, or where the model's positions end. Random numbers come from the
    seed alone, and on the CPU, so that another device changes the text only where rounding does.

    Raises:
        UserError: the prompt is empty, is too long for the model, or holds ids that the model does not have.
    """
    _check_prompt(model, prompt_ids)
    return _generate(model, prompt_ids, options, eos_id)


def _check_prompt(model: MiniMind, prompt_ids: Sequence[int]) -> None:
    config = model.config
    if not prompt_ids:
        raise UserError("the prompt has no tokens; begin it with BOS at least")
    if len(prompt_ids) > config.longest_sequence:
        raise UserError(
            f"the prompt has {len(prompt_ids)} tokens and the model reads at most {config.longest_sequence}; "
            "shorten the prompt, or stretch the positions by --inference-rope-scaling"
        )
    if max(prompt_ids) >= config.vocab_size:
        raise UserError(
            f"the prompt holds token {max(prompt_ids)} but the model's vocabulary has {config.vocab_size} entries; "
            "use the tokenizer that the model was trained with"
        )


def _generate(
    model: MiniMind, prompt_ids: Sequence[int], options: GenerateOptions, eos_id: int | None
) -> Iterator[int]:
    device = model.head_weight.device
    generator = torch.Generator().manual_seed(options.seed)
    cache = KVCache()
    unread = list(prompt_ids)
    # The last token needs no position of its own: nothing is asked of the model after it.
    room = model.config.longest_sequence - len(prompt_ids) + 1
    for _ in range(min(options.max_new_tokens, room)):
        logits = _next_logits(model, torch.tensor([unread], device=device), cache)
        if not logits.isfinite().all():
            raise UserError(
                "the model's weights give no numbers any more, as after a --learning-rate that was far too high; take an "
                "earlier --checkpoint, or train anew"
            )
        chosen = choose(logits, options, generator)
        if chosen == eos_id:
            return
        yield chosen
        unread = [chosen]


def _next_logits(model: MiniMind, input_ids: Tensor, cache: KVCache) -> Tensor:
    """Read `input_ids` into the cache, without dropout, and return the float32 scores [V] of what follows."""
    training = model.training
    # Set around each pass and not around the whole answer, which the caller may leave unfinished.
    if training:
        model.eval()
    try:
        with torch.inference_mode():
            return model.logits(model(input_ids, cache=cache)[0, -1]).float().cpu()
    finally:
        if training:
            model.train()


def choose(logits: Tensor, options: GenerateOptions, generator: torch.Generator) -> int:
    """Choose the next token from its scores [V]: at temperature 0 the likeliest, else one of `candidates`."""
    if options.temperature == 0:
        return int(logits.argmax())
    ids, probabilities = candidates(logits, options)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def candidates(logits: Tensor, options: GenerateOptions) -> tuple[Tensor, Tensor]:
    """Return the ids that may be chosen, likeliest first, and their probabilities.

    Temperature first, then top-k, then top-p over what top-k left, as MiniMind does it. The likeliest token always
    stays, and the one that crosses `top_p` is the last that does.
    """
    # In double and with the largest at 0, so that no temperature is too small.
    scaled = (logits.double() - logits.max()) / options.temperature
    ordered, ids = torch.sort(scaled, descending=True, stable=True)
    if options.top_k:
        ordered, ids = ordered[: options.top_k], ids[: options.top_k]
    probabilities = ordered.softmax(-1)
    if options.top_p < 1:
        chance_before = probabilities.cumsum(-1) - probabilities
        num_kept = max(1, int((chance_before <= options.top_p).sum()))
        ids, probabilities = ids[:num_kept], ordered[:num_kept].softmax(-1)
    return ids, probabilities


def stream_text(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Yield the text of `ids` piece by piece, without special tokens; joined, it is `tokenizer.decode` of all ids.

    For tokenizers of bytes, whose tokens may end inside a character: such a token is held back until the character is
    whole. Bytes that never make one come out as U+FFFD, at the end at the latest.
    """
    held: list[int] = []
    for token in ids:
        held.append(token)
        text = tokenizer.decode(held)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            held.clear()
            if text:
                yield text
    if held:
        yield tokenizer.decode(held)
