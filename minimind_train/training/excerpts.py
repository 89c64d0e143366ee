"""What a model writes as it learns: a few words after fixed prompts, every so many steps.

Looking leaves no trace in a run: the random numbers are of a generator of their own, the same every time, so what changes from one
excerpt to the next is the model.
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
"""Takes the step, a name for the prompt, and the prompt with what was written after it."""


class Excerpts:
    """Lets a model write, every so many steps.

    Args:
        learner: whose model writes, as it learns; it is left in the mode that it was in.
        config: how often, after what.
        tokenizer: the run's.
        say: takes each excerpt as a line for the user.
        show: takes each excerpt for trackers.

    Raises:
        UserError: a prompt leaves the model no room.
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
        self._prompts = [
            (text, [tokenizer.info.bos_id, *tokenizer.reference.encode(text, add_special_tokens=False).ids])
            for text in config.sample_prompt
        ]
        longest = max(len(ids) for _, ids in self._prompts)
        if longest > (most := learner.model.config.max_position_embeddings):
            raise UserError(
                f"`sample_prompt` has {longest} tokens and the model reads at most {most}",
                remedy="shorten it",
                option="sample_prompt",
            )

    def after_step(self, step: int) -> None:
        """Write where that is due."""
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
