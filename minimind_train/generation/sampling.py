"""Sampling: one token after another from a trained model, and their text as they come.

Knows models, ids and tokenizers, but no run folders, files or chat templates.
"""

from collections.abc import Iterator, Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from minimind_data.errors import UserError
from minimind_train.generation.options import GenerateOptions
from minimind_train.model.transformer import KVCache, MiniMind


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
        raise UserError("the prompt has no tokens", remedy="begin it with BOS at least")
    if len(prompt_ids) > config.longest_sequence:
        raise UserError(
            f"the prompt has {len(prompt_ids)} tokens and the model reads at most {config.longest_sequence}",
            remedy="shorten the prompt, or stretch the positions by `inference_rope_scaling`",
            option="inference_rope_scaling",
        )
    if max(prompt_ids) >= config.vocab_size:
        raise UserError(
            f"the prompt holds token {max(prompt_ids)} but the model's vocabulary has {config.vocab_size} "
            "entries",
            remedy="use the tokenizer that the model was trained with",
        )


def _generate(
    model: MiniMind, prompt_ids: Sequence[int], options: GenerateOptions, eos_id: int | None
) -> Iterator[int]:
    device = model.head_weight.device
    generator = torch.Generator().manual_seed(options.seed)
    cache = KVCache()
    unread = list(prompt_ids)
    # The last token needs no position: the model does not read it.
    room = model.config.longest_sequence - len(prompt_ids) + 1
    for _ in range(min(options.max_new_tokens, room)):
        logits = _next_logits(model, torch.tensor([unread], device=device), cache)
        if not logits.isfinite().all():
            raise UserError(
                "the model's weights give no numbers any more, as after a `learning_rate` that was far too "
                "high",
                remedy="take an earlier `checkpoint`, or train anew",
                option="checkpoint",
            )
        chosen = choose(logits, options, generator)
        if chosen == eos_id:
            return
        yield chosen
        unread = [chosen]


def _next_logits(model: MiniMind, input_ids: Tensor, cache: KVCache) -> Tensor:
    """Read `input_ids` into the cache, without dropout, and return the float32 scores [V] of what follows."""
    training = model.training
    # Around each pass and not around the whole answer, because the caller may stop in the middle of that.
    if training:
        model.eval()
    try:
        with torch.inference_mode():
            return model.logits(model(input_ids, cache=cache)[0, -1]).float().cpu()
    finally:
        if training:
            model.train()


def choose(logits: Tensor, options: GenerateOptions, generator: torch.Generator) -> int:
    """Choose the next token from scores [V]: at temperature 0 the most likely, otherwise one of `candidates`."""
    if options.temperature == 0:
        return int(logits.argmax())
    ids, probabilities = candidates(logits, options)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def candidates(logits: Tensor, options: GenerateOptions) -> tuple[Tensor, Tensor]:
    """Return the ids that may be chosen, the most likely first, and their probabilities.

    Temperature first, then top-k, then top-p over what top-k left, as in MiniMind. The most likely token is always kept, and
    the one that crosses `top_p` is the last that is.
    """
    # In float64 and with the largest at 0, so that no temperature is too small.
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

    Tokens of byte-level tokenizers may end inside a character. Such a token waits until the character is whole. Bytes that never
    make a character come out as U+FFFD, at the end at the latest.
    """
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        text = tokenizer.decode(pending)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            pending.clear()
            if text:
                yield text
    if pending:
        yield tokenizer.decode(pending)
