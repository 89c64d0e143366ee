"""A chat with a trained model, `mm-train generate --chat`: its messages, and the next answer as it is generated.

`minimind_data.chat.encoding` turns the messages into ids, `sampling` generates.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from minimind_data.chat.encoding import encode_prompt, ends_of_answers
from minimind_data.chat.template import ChatTemplate, chat_template_of
from minimind_data.errors import UserError
from minimind_data.tokenizer.loading import Tokenizer
from minimind_train.generation.options import DEFAULTS, GenerateOptions
from minimind_train.generation.sampling import generate, stream_text
from minimind_train.model.transformer import MiniMind
from minimind_train.parallel.devices import resolve_device
from minimind_train.progress import Say, say_on_stderr
from minimind_train.run_folder.options import CheckpointChoice
from minimind_train.weights.loading import open_model


class ChatSession:
    """A chat with a model.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        template: of the chat.
        options: of sampling; every answer has a seed of its own, so the same question may get different answers.
        system: text of a system message at the beginning.
        tools: JSON schemas of functions that the model may call; nothing here calls them.
        thinking: whether answers begin with reasoning; None leaves that to the template.

    Raises:
        UserError: the template knows no tools, or no such choice.

    Attributes:
        messages: of the user and of the model so far, after the system message.
    """

    def __init__(
        self,
        model: MiniMind,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        options: GenerateOptions,
        system: str | None = None,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool | None = None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._template = template
        self._options = options
        self._tools = tools
        self._thinking = thinking
        self._ends = ends_of_answers(tokenizer, template)
        self._first = [{"role": "system", "content": system}] if system else []
        self._turns = 0
        self.messages: list[dict[str, Any]] = []
        self.clear()
        self._encode(
            [{"role": "user", "content": "?"}]
        )  # what the template cannot do is said before the first question

    @classmethod
    def open(
        cls,
        run: Path | str,
        options: GenerateOptions = DEFAULTS,
        *,
        system: str | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool | None = None,
        checkpoint: CheckpointChoice = None,
        device: str = "auto",
        changes: Mapping[str, Any] = MappingProxyType({}),
        tokenizer: Path | str | None = None,
        lora: Path | str | None = None,
        say: Say = say_on_stderr,
    ) -> Self:
        """Begin a chat with the model of a run, a Hugging Face folder or MiniMind's `.pth`, with the template of its tokenizer.

        Args:
            run: the folder or file.
            options: of sampling.
            system: text of a system message at the beginning.
            tools: JSON schemas of functions that the model may call; `minimind_data.chat.tools` reads them from a file.
            thinking: whether answers begin with reasoning; None leaves that to the template.
            checkpoint: the step of one, or `best`, if it is a run.
            device: where to compute.
            changes: options of the model: those that are to differ, such as those of its positions, or that a `.pth` does not tell.
            tokenizer: of weights that are no run's, where it is not beside them or MiniMind's own.
            lora: a file of MiniMind's adapters, which are merged into the weights.
            say: called with a sentence about each damaged checkpoint, and on what a `.pth` was taken for.

        Raises:
            UserError: there is no such model, no template, or it knows no tools or no reasoning where these are asked for.
        """
        trained = open_model(
            Path(run), step=checkpoint, say=say, changes=changes, tokenizer=tokenizer, lora=lora
        )
        model = trained.model.to(resolve_device(device))
        template = template_of(trained.tokenizer_folder)
        return cls(model, trained.tokenizer, template, options, system, tools=tools, thinking=thinking)

    def clear(self) -> None:
        """Forget all messages but the system message."""
        self.messages = list(self._first)

    def answer(self, text: str) -> Iterator[str]:
        """Yield the answer to a message of the user, piece by piece.

        If the caller stops early, the pieces so far are the answer that is remembered. The oldest turns are forgotten when the
        model cannot read all of them.

        Raises:
            UserError: the message cannot be sent to the model; the messages are as they were before.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(
                "this holds bytes that are no text in this terminal's encoding", remedy="write UTF-8"
            ) from None
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            prompt_ids = self._prompt_ids()
            options = replace(self._options, seed=(self._options.seed + self._turns) % 2**63)
            ids = generate(self._model, prompt_ids, options=options, eos_id=None)
        except UserError:
            self.messages = before
            raise
        self._turns += 1
        return self._streamed(itertools.takewhile(lambda token: token not in self._ends, ids))

    def _streamed(self, ids: Iterator[int]) -> Iterator[str]:
        answer: dict[str, Any] = {"role": "assistant", "content": ""}
        self.messages.append(answer)
        for piece in stream_text(self._tokenizer.reference, ids):
            answer["content"] += piece
            yield piece

    def _prompt_ids(self) -> list[int]:
        longest = self._model.config.longest_sequence
        while True:
            prompt_ids = self._encode(self.messages)
            oldest = len(self._first)
            if len(prompt_ids) <= longest or len(self.messages) <= oldest + 1:
                return prompt_ids
            del self.messages[oldest : oldest + 2]

    def _encode(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        return encode_prompt(
            self._tokenizer, self._template, messages, tools=self._tools, thinking=self._thinking
        )


def template_of(run: Path) -> ChatTemplate:
    """Return the chat template in the folder of a model.

    Raises:
        UserError: there is none.
    """
    template = chat_template_of(run)
    if template is None:
        raise UserError(
            "has no chat template, which says how turns are written",
            where=run,
            remedy="put the tokenizer_config.json or chat_template.jinja of its tokenizer into the folder, or leave `chat` out",
            option="chat",
        )
    return template
