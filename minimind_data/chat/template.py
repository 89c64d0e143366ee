"""The chat template: how a conversation becomes one text, exactly as `transformers.apply_chat_template` renders it.

A template is a program in Jinja. It comes with the tokenizer, in `chat_template.jinja` or `tokenizer_config.json`, from whoever made
that. So it runs in Jinja's sandbox, and sees only plain JSON values.

Not here: what a record must look like (`conversations`, `messages`), and how special tokens in what people wrote are kept from being
taken for the template's own (`rendering`).

Source of the environment: transformers, utils/chat_template_utils.py (`_cached_compile_jinja_template`, `render_jinja_template`)
and tokenization_utils_base.py (`apply_chat_template`).
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes

from minimind_data.chat.messages import text_of
from minimind_data.chat.metering import TooMuchWorkError
from minimind_data.chat.sandbox import Generation, compiled, parse, run
from minimind_data.dataset.format import TEMPLATE_NAME, TOKENIZER_CONFIG_NAME, TokenizerInfo
from minimind_data.errors import UserError
from minimind_data.files import parse_json
from minimind_data.tokenizer.places import place_of

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
"""Names of the field with a message's reasoning; templates read the first, gpt-oss's the second."""

_MAX_DATE_FORM = 100

Message = Mapping[str, Any]

THINKING_NAMES = ("open_thinking", "enable_thinking")
"""The variables by which templates let an answer begin with reasoning: MiniMind's, and Qwen's, which many others took over."""


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A chat template, and the special tokens that it may name."""

    text: str
    special_tokens: tuple[tuple[str, Any], ...] = ()
    """(name, value) as in tokenizer_config.json: `bos_token` and the like, and lists of additional ones."""

    @property
    def is_dated(self) -> bool:
        """Whether it may write today's date."""
        return "strftime_now" in meta.find_undeclared_variables(parse(self.text))

    @property
    def marks_generation(self) -> bool:
        """Whether it marks by {% generation %} what the assistant wrote."""
        marks = parse(self.text).find_all(nodes.ExtensionAttribute)
        return any(mark.name == Generation.method for mark in marks)

    @property
    def constants(self) -> frozenset[str]:
        """The texts in it: those that it writes, those that it compares with, and names of fields."""
        tree = parse(self.text)
        strings = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        strings |= {node.attr for node in tree.find_all(nodes.Getattr)}
        return frozenset(strings | {node.data for node in tree.find_all(nodes.TemplateData)})

    def reads(self, field: str) -> bool:
        """Tell whether it reads a field of messages, or a variable, of this name."""
        names = REASONING_NAMES if field in REASONING_NAMES else (field,)
        return not names_read_by(self).isdisjoint(names) or writes_all_fields(self)

    def for_tokenizer(self, info: TokenizerInfo) -> "ChatTemplate":
        """Return the same template, but for `bos_token` where the tokenizer is used without BOS."""
        if info.bos_id is not None:
            return self
        kept = tuple((name, value) for name, value in self.special_tokens if name != "bos_token")
        return replace(self, special_tokens=kept)

    @property
    def config_json(self) -> str:
        """A `tokenizer_config.json` with it, which `transformers` reads, and `chat_template_of` too."""
        config = {
            **dict(self.special_tokens),
            "clean_up_tokenization_spaces": False,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": self.text,
        }
        return json.dumps(config, ensure_ascii=False, indent=1) + "\n"


class RenderError(Exception):
    """A template refused a conversation, or failed on it; the message says why."""


def chat_template_of(path: Path | str | None, file: Path | None = None) -> ChatTemplate | None:
    """Return the chat template of a tokenizer, or None where it has none.

    `chat_template.jinja` takes precedence over `tokenizer_config.json`. If the latter has several templates, `default` is taken.

    Args:
        path: a folder with a tokenizer in it (a dataset, a run, a Hugging Face folder), a tokenizer.json, a name or id that
            `place_of` knows, or None for the usual tokenizer that ships with this package.
        file: a file with another template, which is taken instead of the tokenizer's own.

    Raises:
        UserError: a file cannot be read, or the template is no Jinja.
    """
    path = place_of(path)
    folder = path if path.is_dir() else path.parent
    config_path = folder / TOKENIZER_CONFIG_NAME
    try:
        config = parse_json(config_path.read_bytes())
    except FileNotFoundError:
        config = {}
    except ValueError as error:
        raise UserError(f"not JSON ({error})", where=config_path) from None
    if not isinstance(config, dict):
        config = {}
    if file is not None or (folder / TEMPLATE_NAME).is_file():
        return _read_template(file or folder / TEMPLATE_NAME, config)
    text = config.get("chat_template")
    if isinstance(text, list):
        named = {one.get("name"): one.get("template") for one in text if isinstance(one, dict)}
        text = named.get("default")
    if text is None:
        return None
    return _checked(text, config, config_path)


def _read_template(path: Path, config: Mapping[str, Any]) -> ChatTemplate:
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise UserError(
            "no such file",
            where=path,
            remedy="`chat_template` takes a file with a chat template",
            option="chat_template",
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror})",
            where=path,
            remedy="`chat_template` takes a file",
            option="chat_template",
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"no UTF-8 ({error.reason} at byte {error.start})", where=path) from None
    return _checked(text, config, path)


def _checked(text: object, config: Mapping[str, Any], path: Path) -> ChatTemplate:
    if not isinstance(text, str):
        raise UserError(
            "its chat template is no text", where=path, remedy=f"put one into {TEMPLATE_NAME} beside it"
        )
    special: list[tuple[str, Any]] = [
        (name, _plain_token(config[name])) for name in _SPECIAL_NAMES if config.get(name) is not None
    ]
    more = config.get("additional_special_tokens")
    if isinstance(more, list) and more:
        special.append(("additional_special_tokens", tuple(map(_plain_token, more))))
    try:
        compiled(text)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"its chat template is no Jinja (line {error.lineno}: {error})", where=path) from None
    except Exception as error:  # noqa: BLE001 - Python's compiler raises several when it is asked for too much
        raise UserError(
            f"its chat template is nested too deeply, or holds what no chat template needs ({type(error).__name__}: {error})",
            where=path,
        ) from None
    return ChatTemplate(text=text, special_tokens=tuple(special))


def _plain_token(token: Any) -> str:
    """Return the text of a token, which may be written as an object."""
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def render_chat(
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    now: Callable[[], datetime] = datetime.now,
    mark_generation: bool = False,
    **variables: Any,
) -> str:
    """Render a conversation.

    Args:
        template: the tokenizer's.
        messages: of a conversation, each with a `role` and mostly a `content`.
        add_generation_prompt: end with what the assistant's next turn begins with.
        tools: JSON schemas of functions that the assistant may call.
        now: returns the time that the template may write.
        mark_generation: put `SPAN_OPENS` and `SPAN_CLOSES` around what {% generation %} marks.
        variables: what else the template knows, such as `enable_thinking`.

    Raises:
        RenderError: the template refuses the conversation, or fails on it.
    """
    messages = with_parts_joined(template, messages)
    variables["add_generation_prompt"] = add_generation_prompt
    return _render(template, messages, tools, variables, now=now, mark_generation=mark_generation)


def _render(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
    *,
    now: Callable[[], datetime],
    mark_generation: bool,
) -> str:
    special = {
        name: list(value) if isinstance(value, tuple) else value for name, value in template.special_tokens
    }
    context = {"tools": tools, "documents": None, "add_generation_prompt": False, **special, **variables}
    variables = {
        **context,
        "messages": [_as_templates_want(message) for message in messages],
        "strftime_now": lambda form: now().strftime(form[:_MAX_DATE_FORM]),
    }
    try:
        return run(compiled(template.text, mark_generation=mark_generation), variables)
    except TooMuchWorkError as error:
        raise RenderError(str(error)) from None
    except Exception as error:  # noqa: BLE001 - a template is a program, which may fail in any way
        if type(error) is jinja2.TemplateError:  # what it raises itself
            raise RenderError(f"the chat template refuses it ({error.message}); {_REMEDY}") from None
        raise RenderError(
            f"the chat template fails on it ({type(error).__name__}: {error}); {_REMEDY}"
        ) from None


_REMEDY = "give its messages the roles and fields that the template reads, or name another template with `chat_template`"


def with_parts_joined(template: ChatTemplate, messages: Sequence[Message]) -> list[Message]:
    """Return messages in which a content in parts is one text, except for the roles whose parts the template takes.

    A template that does not know parts silently leaves them out (MiniMind's do), fails on them, or writes them as a list.
    """
    if not any(isinstance(message.get("content"), list) for message in messages):
        return list(messages)
    joined: list[Message] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and message.get("role") not in roles_in_parts(template):
            joined.append({**message, "content": text_of(content)})
        else:
            joined.append(message)
    return joined


def with_arguments_parsed(template: ChatTemplate, messages: Sequence[Message]) -> list[Message]:
    """Return messages in which the arguments of tool calls are objects where they are JSON in a string.

    A template that writes both alike gets the strings as they are. Others would write the string as a string of JSON once more.

    Raises:
        RenderError: such a string is no JSON object.
    """
    if not any(message.get("tool_calls") for message in messages) or takes_arguments_as_text(template):
        return list(messages)
    return [
        {**message, "tool_calls": [_with_arguments_parsed(call) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def _with_arguments_parsed(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments_parsed(call["function"])}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        parsed = parse_json(arguments) if arguments.strip() else {}
    except ValueError as error:
        raise RenderError(
            f"the arguments of a tool call are a string that is no JSON ({error}); write an object"
        ) from None
    if not isinstance(parsed, dict):
        raise RenderError(
            "the arguments of a tool call are a string of JSON that is no object; write an object"
        )
    return {**call, "arguments": parsed}


@functools.lru_cache(maxsize=8)
def takes_arguments_as_text(template: ChatTemplate) -> bool:
    """Tell whether a template writes the arguments of tool calls alike, be they an object or that object as JSON."""
    arguments = {"at": "tree"}
    for nested in (False, True):
        rendered = []
        for form in (arguments, json.dumps(arguments)):
            call = {"name": "pick", "arguments": form}
            calls = [{"type": "function", "id": "123456789", "function": call} if nested else call]
            messages = [{**one, "tool_calls": calls} if "tool_calls" in one else one for one in _PROBE]
            try:
                rendered.append(
                    _render(template, messages, _PROBE_TOOLS, {}, now=_at_any_time, mark_generation=False)
                )
            except RenderError:
                rendered.append("")
        if rendered[0] != rendered[1]:
            return False
    return True


@functools.lru_cache(maxsize=8)
def names_read_by(template: ChatTemplate) -> frozenset[str]:
    """Return the names of variables in a template, and those of fields, apart from fields of tools and of calls.

    Every text in a template counts as such a name: it may be one.
    """
    tree = parse(template.text)
    calls = {"tools"}
    sources = [(loop.target, loop.iter) for loop in tree.find_all(nodes.For)]
    sources += [(assignment.target, assignment.node) for assignment in tree.find_all(nodes.Assign)]
    for target, source in sources:
        parts = (source, *source.find_all((nodes.Name, nodes.Getattr)))
        if isinstance(target, nodes.Name) and any(_is_of_call(part, calls) for part in parts):
            calls.add(target.name)
    names = {access.attr for access in tree.find_all(nodes.Getattr) if not _is_of_call(access.node, calls)}
    of_calls = {id(access.arg) for access in tree.find_all(nodes.Getitem) if _is_of_call(access.node, calls)}
    texts = (text for text in tree.find_all(nodes.Const) if id(text) not in of_calls)
    names |= {text.value for text in texts if isinstance(text.value, str)}
    return frozenset(names | meta.find_undeclared_variables(tree))


def _is_of_call(node: nodes.Node, names: set[str]) -> bool:
    """Tell whether an expression is a tool or a call, or a list of them: one of these variables, or a field that holds such."""
    if isinstance(node, nodes.Name):
        return node.name in names
    return isinstance(node, nodes.Getattr) and node.attr in ("tool_calls", "function")


@functools.lru_cache(maxsize=8)
def writes_all_fields(template: ChatTemplate) -> bool:
    """Tell whether a template writes every field of a message, whatever its name."""
    messages = [{**one, "any_other_field": "seven apples"} for one in _PROBE if one["role"] == "user"][:1]
    try:
        text = _render(template, messages, None, {}, now=_at_any_time, mark_generation=False)
    except RenderError:
        return False
    return "seven apples" in text


_PROBE: Sequence[Message] = (
    {"role": "system", "content": "all apples"},
    {"role": "user", "content": "one apple"},
    {"role": "assistant", "content": "two apples", "tool_calls": [{"name": "pick", "arguments": {}}]},
    {"role": "tool", "content": "three apples"},
    {"role": "assistant", "content": "four apples"},
    {"role": "user", "content": "five apples"},
    {"role": "assistant", "content": "six apples"},
)

_PROBE_TOOLS: Sequence[Mapping[str, Any]] = ({"type": "function", "function": {"name": "pick"}},)


@functools.lru_cache(maxsize=8)
def roles_in_parts(template: ChatTemplate) -> frozenset[str]:
    """Return the roles whose contents a template takes in parts: those for which one part renders as the text itself does."""
    return frozenset(role for role in ("system", "user", "assistant", "tool") if _takes_parts(template, role))


def _takes_parts(template: ChatTemplate, role: str) -> bool:
    whole = [one for one in _PROBE if one["role"] in {"user", "assistant", role}]
    if role != "tool":
        whole = [{**one, "tool_calls": None} for one in whole]
    parted = [
        {**one, "content": [{"type": "text", "text": one["content"]}]} if one["role"] == role else one
        for one in whole
    ]
    contents = [one["content"] for one in whole if one["role"] == role]
    takes = False
    for tools in (None, _PROBE_TOOLS):
        try:
            rendered = _render(template, whole, tools, {}, now=_at_any_time, mark_generation=False)
        except RenderError:
            continue  # it has no such role, or no tools
        try:
            takes = rendered == _render(template, parted, tools, {}, now=_at_any_time, mark_generation=False)
        except RenderError:
            return False
        if not (takes and all(text in rendered for text in contents)):
            return False
    return takes


def _at_any_time() -> datetime:
    return datetime.combine(date(2000, 1, 1), time())


def _as_templates_want(message: Message) -> dict[str, Any]:
    """Leave out nulls, which many templates would write as None, and give the reasoning all of its names."""
    fields = {name: value for name, value in message.items() if value is not None}
    reasoning = next((fields[name] for name in REASONING_NAMES if name in fields), None)
    return fields if reasoning is None else {"thinking": reasoning, **fields, "reasoning_content": reasoning}
