"""What a model writes as it learns: a few words after fixed prompts, every so many steps.

Looking leaves no trace in a run: the random numbers are of a generator of their own, the same every time, so what changes from one
excerpt to the next is the model.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

from tokenizers import Tokenizer

from minimind_data.dataset.format import TokenizerInfo
from minimind_data.errors import UserError
from minimind_train.generation.options import GenerateOptions
from minimind_train.generation.sampling import generate, stream_text
from minimind_train.model.transformer import MiniMind
from minimind_train.training.options import ExcerptOptions

Tell = Callable[[int, str, str, str], None]
"""Takes the step, a name for the prompt, the prompt, and what was written after it."""


class Excerpts:
    """Lets a model write, every so many steps.

    Args:
        model: as it learns; it is left in the mode that it was in.
        config: how often, after what.
        tokenizer: the run's.
        info: its special ids.
        tell: takes each excerpt.
        around: gives what is entered while the model writes.

    Raises:
        UserError: a prompt leaves the model no room.
    """

    def __init__(
        self,
        model: MiniMind,
        config: ExcerptOptions,
        *,
        tokenizer: Tokenizer,
        info: TokenizerInfo,
        tell: Tell,
        around: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        self._model = model
        self._every = config.sample_every
        self._options = GenerateOptions(max_new_tokens=config.sample_tokens)
        self._tokenizer = tokenizer
        self._eos_id = info.eos_id
        self._tell = tell
        self._around = around
        self._prompts = [
            (text, [info.bos_id, *tokenizer.encode(text, add_special_tokens=False).ids])
            for text in config.sample_prompt
        ]
        longest = max(len(ids) for _, ids in self._prompts)
        if longest > model.config.max_position_embeddings:
            raise UserError(
                f"--sample-prompt has {longest} tokens and the model reads at most {model.config.max_position_embeddings}; shorten it"
            )

    def after_step(self, step: int) -> None:
        """Write where that is due."""
        if not self._every or step % self._every:
            return
        for number, (prompt, ids) in enumerate(self._prompts, 1):
            name = "sample" if len(self._prompts) == 1 else f"sample/{number}"
            with self._around():
                new = generate(self._model, ids, options=self._options, eos_id=self._eos_id)
                text = "".join(stream_text(self._tokenizer, new))
            self._tell(step, name, prompt, text)
