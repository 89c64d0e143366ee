"""An HTTP server over one model, for the clients of OpenAI's API and for a browser: `mm-train serve`.

It answers POST /v1/chat/completions and /v1/completions, whole or as a stream, GET /v1/models and /health, and GET / with a chat page.
It computes one answer at a time, while others wait. It has no batching, no cache between requests and no authentication: for many
users, export the model and use vLLM.

Source: https://platform.openai.com/docs/api-reference/chat
"""

import itertools
import json
import socket
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

from minimind_data.chat.encoding import encode_prompt, ends_of_answers
from minimind_data.chat.template import THINKING_NAMES, ChatTemplate, chat_template_of
from minimind_data.errors import UserError
from minimind_data.html import fill, read_template
from minimind_data.tokenizer.loading import Tokenizer
from minimind_train.generation.options import DEFAULTS, GenerateOptions
from minimind_train.generation.sampling import generate, stream_text
from minimind_train.model.transformer import MiniMind
from minimind_train.parallel.devices import resolve_device
from minimind_train.progress import Say, say_on_stderr
from minimind_train.run_folder.options import CheckpointChoice
from minimind_train.weights.loading import open_model

try:
    import anyio
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
    from pydantic import BaseModel, ConfigDict, Field
except ImportError:
    raise UserError(
        "the server needs FastAPI and uvicorn", remedy="pip install 'minimind-pipeline[serve]'"
    ) from None

__all__ = ["ServedModel", "application", "listen", "serve"]

_UNSUPPORTED_FIELDS: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "modalities": (["text"],),
}
"""Fields of requests that are not supported, and the values that ask for nothing, which are accepted."""

_ONLY_THINKING = (
    f"chat_template_kwargs may hold {' or '.join(THINKING_NAMES)}, true or false, and nothing else"
)
_IGNORED_FIELDS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
_MAX_STOPS = 4


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model, and what is needed to answer with it.

    Attributes:
        name: what clients call it.
        model: in evaluation mode, where it computes.
        tokenizer: the model's.
        template: how turns of a chat are written; without one there is no chat.
        options: of sampling, for what a request does not set; each answer has a seed of its own.
    """

    name: str
    model: MiniMind
    tokenizer: Tokenizer
    template: ChatTemplate | None
    options: GenerateOptions = DEFAULTS

    @classmethod
    def open(
        cls,
        run: Path | str,
        options: GenerateOptions = DEFAULTS,
        *,
        checkpoint: CheckpointChoice = None,
        device: str = "auto",
        changes: Mapping[str, Any] = MappingProxyType({}),
        tokenizer: Path | str | None = None,
        lora: Path | str | None = None,
        say: Say = say_on_stderr,
    ) -> Self:
        """Return the model of a run, a Hugging Face folder or MiniMind's `.pth`, by the name of the folder or file.

        Args:
            run: the folder or file.
            options: of sampling.
            checkpoint: the step of one, or `best`, if it is a run.
            device: where to compute.
            changes: options of the model: those that are to differ, such as those of its positions, or that a `.pth` does not tell.
            tokenizer: of weights that are no run's, where it is not beside them or MiniMind's own.
            lora: a file of MiniMind's adapters, which are merged into the weights.
            say: called with a sentence about each damaged checkpoint, and on what a `.pth` was taken for.

        Raises:
            UserError: there is no such model.
        """
        trained = open_model(
            Path(run), step=checkpoint, say=say, changes=changes, tokenizer=tokenizer, lora=lora
        )
        return cls(
            name=trained.name,
            model=trained.model.to(resolve_device(device)),
            tokenizer=trained.tokenizer,
            template=chat_template_of(trained.tokenizer_folder),
            options=options,
        )


class _Request(BaseModel):
    """The fields that requests of both kinds have."""

    model_config = ConfigDict(extra="allow")

    model: str = ""
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None

    def options(self, defaults: GenerateOptions, seed: int) -> GenerateOptions:
        """Return how to sample.

        Raises:
            UserError: an option cannot have that value, or is not supported.
        """
        for name, value in (self.model_extra or {}).items():
            if name in _IGNORED_FIELDS or value is None or value in _UNSUPPORTED_FIELDS.get(name, ()):
                continue
            raise UserError(f"{name} {json.dumps(value)[:60]} is not supported by this server", option=name)
        values: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "max_new_tokens": self.max_tokens,
            "seed": seed if self.seed is None else self.seed,
        }
        try:
            return replace(defaults, **{name: value for name, value in values.items() if value is not None})
        except ValueError as error:
            raise UserError(str(error).replace("max_new_tokens", "max_tokens").replace("`", "")) from None

    @property
    def stops(self) -> list[str]:
        """The texts before which an answer ends.

        Raises:
            UserError: one is empty, or there are too many.
        """
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > _MAX_STOPS or not all(stops):
            raise UserError(f"stop must be at most {_MAX_STOPS} texts, none of them empty", option="stop")
        return stops

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool((self.stream_options or {}).get("include_usage"))


class _ChatRequest(_Request):
    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_completion_tokens: int | None = None

    def options(self, defaults: GenerateOptions, seed: int) -> GenerateOptions:
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return super(_ChatRequest, self.model_copy(update={"max_tokens": limit})).options(defaults, seed)

    @property
    def thinking(self) -> bool | None:
        """Whether the answer is to begin with reasoning; None where nothing is said.

        Raises:
            UserError: the template is to be given something else.
        """
        said = self.chat_template_kwargs or {}
        values = list(said.values())
        if not said.keys() <= set(THINKING_NAMES) or not all(value is values[0] for value in values):
            raise UserError(_ONLY_THINKING, option="chat_template_kwargs")
        if values and not isinstance(values[0], bool):
            raise UserError(_ONLY_THINKING, option="chat_template_kwargs")
        return values[0] if values else None


class _CompletionRequest(_Request):
    prompt: str | list[int] | list[str]


class _Answer:
    """An answer, piece by piece; afterwards, how long it was and why it ended.

    Args:
        served: the model.
        prompt_ids: what is to be continued.
        options: of sampling.
        ends: ids before which it ends.
        stops: texts before which it ends.

    Attributes:
        num_tokens: that the model has generated, with the one that ended the answer.
        finish_reason: `stop`, at an end, or `length`.
    """

    def __init__(
        self,
        served: ServedModel,
        prompt_ids: Sequence[int],
        options: GenerateOptions,
        *,
        ends: frozenset[int],
        stops: Sequence[str],
    ) -> None:
        self._ids = generate(served.model, prompt_ids, options=options, eos_id=None)
        self._encoder = served.tokenizer.reference
        self._ends = ends
        self._stops = stops
        self.num_prompt_tokens = len(prompt_ids)
        self.num_tokens = 0
        self.finish_reason: Literal["stop", "length"] = "length"

    @property
    def usage(self) -> dict[str, int]:
        """The numbers of tokens, as the API gives them."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_tokens,
        }

    def pieces(self) -> Iterator[str]:
        """Yield its text. What may be the beginning of a stop is held back until that is clear."""
        text = ""
        for piece in stream_text(self._encoder, self._until_end()):
            text += piece
            places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
            if places:
                self.finish_reason = "stop"
                yield text[: min(places)]
                return
            num_held = max((_overlap(text, stop) for stop in self._stops), default=0)
            yield text[: len(text) - num_held]
            text = text[len(text) - num_held :]
        yield text

    def _until_end(self) -> Iterator[int]:
        for number in self._ids:
            self.num_tokens += 1
            if number in self._ends:
                self.finish_reason = "stop"
                return
            yield number


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next(size for size in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:size]))


@dataclass(frozen=True, kw_only=True)
class _Form:
    """How answers of an endpoint are written."""

    prefix: str
    """Of an answer's id."""
    whole: str
    """The field `object` of a whole answer."""
    part: str
    """The field `object` of a piece of a stream."""

    def choice(self, text: str | None, finish_reason: str | None, *, is_part: bool) -> dict[str, Any]:
        """Return the choice that holds a text."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish_reason}
        if self.prefix == "cmpl":
            return choice | {"text": text or ""}
        if not is_part:
            return choice | {"message": {"role": "assistant", "content": text, "refusal": None}}
        return choice | {"delta": {} if text is None else {"content": text}}


_CHAT = _Form(prefix="chatcmpl", whole="chat.completion", part="chat.completion.chunk")
_COMPLETION = _Form(prefix="cmpl", whole="text_completion", part="text_completion")


class _Responder:
    """Answers requests, one at a time.

    Args:
        served: the model.
    """

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self._lock = anyio.Lock()
        self._seeds = itertools.count(served.options.seed)

    async def chat(self, body: _ChatRequest, request: Request) -> Any:
        """Answer the last message of a chat."""
        served = self._served
        if served.template is None:
            raise UserError(
                f"{served.name} has no chat template", remedy="take /v1/completions, which continues a text"
            )
        options = body.options(served.options, self._next_seed())
        messages = [_with_text(number, message) for number, message in enumerate(body.messages)]
        prompt_ids = encode_prompt(
            served.tokenizer, served.template, messages, tools=body.tools, thinking=body.thinking
        )
        ends = ends_of_answers(served.tokenizer, served.template)
        answer = _Answer(served, prompt_ids, options, ends=ends, stops=body.stops)
        return await self._respond(_CHAT, body, answer, request)

    async def complete(self, body: _CompletionRequest, request: Request) -> Any:
        """Continue a text."""
        served = self._served
        options = body.options(served.options, self._next_seed())
        prompt_ids = _prompt_ids(served.tokenizer, body.prompt)
        ends = frozenset({served.tokenizer.info.eos_id})
        answer = _Answer(served, prompt_ids, options, ends=ends, stops=body.stops)
        return await self._respond(_COMPLETION, body, answer, request)

    def _next_seed(self) -> int:
        return next(self._seeds) % 2**63

    async def _respond(self, form: _Form, body: _Request, answer: _Answer, request: Request) -> Any:
        head = {
            "id": f"{form.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self._served.name,
        }
        if body.stream:
            events = self._events(form, head, body, answer, request)
            return StreamingResponse(events, media_type="text/event-stream")
        text = "".join([piece async for piece in self._pieces(answer, request)])
        choice = form.choice(text, answer.finish_reason, is_part=False)
        return {**head, "object": form.whole, "choices": [choice], "usage": answer.usage}

    async def _pieces(self, answer: _Answer, request: Request) -> AsyncIterator[str]:
        """Yield an answer's text while somebody listens; the event loop is free while the model computes."""
        async with self._lock:
            text = answer.pieces()
            while (piece := await anyio.to_thread.run_sync(next, text, None)) is not None:
                if await request.is_disconnected():
                    return
                if piece:
                    yield piece

    async def _events(
        self, form: _Form, head: Mapping[str, Any], body: _Request, answer: _Answer, request: Request
    ) -> AsyncIterator[str]:
        """Yield the events of a stream: pieces, the reason of the end, and the numbers of tokens where they are asked for."""

        def event(*choices: dict[str, Any], **more: Any) -> str:
            return _event({**head, "object": form.part, "choices": choices, **more})

        try:
            if form is _CHAT:
                role = {"role": "assistant", "content": ""}
                yield event({**form.choice(None, None, is_part=True), "delta": role})
            async for piece in self._pieces(answer, request):
                yield event(form.choice(piece, None, is_part=True))
            yield event(form.choice(None, answer.finish_reason, is_part=True))
            if body.includes_usage:
                yield event(usage=answer.usage)
        except UserError as error:  # the status has been sent
            yield _event(_error(str(error), None))
        yield "data: [DONE]\n\n"


def application(served: ServedModel) -> FastAPI:
    """Return the server's application.

    Args:
        served: what it serves.
    """
    app = FastAPI(title="mm-train serve", docs_url=None, redoc_url=None, openapi_url=None)
    responder = _Responder(served)
    app.post("/v1/chat/completions")(responder.chat)
    app.post("/v1/completions")(responder.complete)
    began = int(time.time())
    page = fill(
        read_template("minimind_train", "generation/server.html"),
        {"name": served.name, "chats": served.template is not None},
        connects=True,
    )

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the one model."""
        model = {"id": served.name, "object": "model", "created": began, "owned_by": "minimind-pipeline"}
        return {"object": "list", "data": [model]}

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say that the server is there."""
        return {"status": "ok"}

    @app.get("/", response_class=HTMLResponse)
    async def browse() -> str:
        """Return the page to chat on."""
        return page

    @app.exception_handler(UserError)
    async def refuse(_request: Request, error: UserError) -> JSONResponse:
        """Say what is wrong with a request."""
        return JSONResponse(_error(str(error).replace("`", ""), error.option), 400)

    @app.exception_handler(RequestValidationError)
    async def refuse_shape(_request: Request, error: RequestValidationError) -> JSONResponse:
        """Say which field of a request is not of the right type."""
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        return JSONResponse(_error(f"{place or 'the body'}: {first['msg']}", place or None), 400)

    return app


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _error(message: str, name: str | None) -> dict[str, Any]:
    content = {"message": message, "type": "invalid_request_error", "param": name, "code": None}
    return {"error": content}


def _with_text(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message whose content is one text, where the API may have a list of parts.

    Raises:
        UserError: a part is no text, or there is no role.
    """
    content = message.get("content")
    if not isinstance(message.get("role"), str):
        raise UserError(f"messages.{number} has no role", option="messages")
    if not isinstance(content, list):
        return dict(message)
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"messages.{number} has parts that are no text", option="messages")
    return {**message, "content": "".join(map(str, texts))}


def _prompt_ids(tokenizer: Tokenizer, prompt: str | list[int] | list[str]) -> list[int]:
    """Return the ids of the prompt of a completion; ids are taken as they are, and text gets BOS before it.

    Raises:
        UserError: there are several prompts, or an id is not in the vocabulary.
    """
    texts = [prompt] if isinstance(prompt, str) else [each for each in prompt if isinstance(each, str)]
    numbers = [each for each in prompt if isinstance(each, int)]
    if len(texts) == 1 and not numbers:
        return tokenizer.prompt_ids(texts[0])
    if not texts and numbers and all(0 <= number < tokenizer.info.vocab_size for number in numbers):
        return numbers
    raise UserError("prompt must be one text, or the ids of one", option="prompt")


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there.

    Args:
        host: an address or name of this machine.
        port: 0 lets the system pick one.

    Raises:
        UserError: nothing can listen there.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"{host}:{port}: {error.strerror}", remedy="choose another `port` or `host`", option="port"
        ) from None


def serve(served: ServedModel, listener: socket.socket) -> None:
    """Serve a model until Ctrl-C or SIGTERM; an answer that is under way then is cut off after a second.

    Args:
        served: the model.
        listener: from `listen`.
    """
    config = uvicorn.Config(
        application(served), log_level="warning", timeout_graceful_shutdown=1, lifespan="off", ws="none"
    )
    uvicorn.Server(config).run(sockets=[listener])
