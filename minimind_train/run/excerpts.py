"""Excerpts: what the model writes after fixed prompts, at intervals during training.

They change nothing in a run. Their random numbers come from a generator of their own and are the same every time, so two excerpts differ
only by the model.
"""

from collections.abc import Callable

from minimind_data.errors import UserError
from minimind_data.tokenizer.loading import Tokenizer
from minimind_train.generation.options import GenerateOptions
from minimind_train.generation.sampling import generate, stream_text
from minimind_train.progress import Say
from minimind_train.training.data_parallel import unsharded
from minimind_train.training.learner import Learner
from minimind_train.training.options import ExcerptOptions

Show = Callable[[int, str, str], None]
"""Takes the step, a name for the prompt, and the prompt with the text written after it."""


def prompts_of(config: ExcerptOptions, tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
    """Return the prompts, each with its ids.

    Raises:
        UserError: one has no token at all.
    """
    prompts = [(text, tokenizer.prompt_ids(text)) for text in config.sample_prompt]
    if not all(ids for _, ids in prompts):
        raise UserError(
            "`sample_prompt` has no token, and the tokenizer no BOS that a text could begin with",
            remedy="pass a text to continue",
            option="sample_prompt",
        )
    return prompts


class Excerpts:
    """Lets the model write at intervals.

    Args:
        learner: whose model writes; it is left in the mode that it was in.
        config: how often, and after which prompts.
        tokenizer: the run's.
        say: takes each excerpt as a line for the user.
        show: takes each excerpt for trackers.

    Raises:
        UserError: a prompt is longer than the model can read, or has no token at all.
    """

    def __init__(
        self,
        learner: Learner,
        config: ExcerptOptions,
        tokenizer: Tokenizer,
        *,
        say: Say,
        show: Show,
    ) -> None:
        self._learner = learner
        self._every = config.sample_every
        self._options = GenerateOptions(max_new_tokens=config.sample_tokens)
        self._tokenizer = tokenizer
        self._say = say
        self._show = show
        self._prompts = prompts_of(config, tokenizer)
        longest = max(len(ids) for _, ids in self._prompts)
        if longest > (most := learner.model.config.max_position_embeddings):
            raise UserError(
                f"`sample_prompt` has {longest} tokens and the model reads at most {most}",
                remedy="shorten it",
                option="sample_prompt",
            )

    def after_step(self, step: int) -> None:
        """Write an excerpt for each prompt, if any are due."""
        if step % self._every:
            return
        info, tokenizer = self._tokenizer.info, self._tokenizer.reference
        for number, (prompt, ids) in enumerate(self._prompts, 1):
            name = "sample" if len(self._prompts) == 1 else f"sample/{number}"
            with unsharded(self._learner):
                new = generate(self._learner.model, ids, options=self._options, eos_id=info.eos_id)
                text = "".join(stream_text(tokenizer, new))
            self._say(f"step {step}  after {prompt!r}: {text!r}")
            self._show(step, name, prompt + text)
