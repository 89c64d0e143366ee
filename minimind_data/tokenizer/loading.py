"""The tokenizer of a dataset: its tokenizer.json, and the ids of BOS, EOS and PAD.

Special tokens are those that tokenizer_config.json names, unless the caller names others. A tokenizer whose config names no BOS, as those of
Qwen, has none, and its documents are stored without. EOS and PAD it must have.

The ids of a text are those that Hugging Face `tokenizers` returns for `encode(text, add_special_tokens=False)`, which recognises
special tokens in the text. `backends` has the encoders.

Source of the file format: https://huggingface.co/docs/tokenizers (tokenizer.json), and transformers' tokenizer_config.json.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tokenizers

from minimind_data.dataset.format import (
    MANIFEST_NAME,
    MAX_VOCABULARY,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
    Manifest,
    TokenizerInfo,
)
from minimind_data.errors import UserError
from minimind_data.files import parse_json
from minimind_data.tokenizer.places import place_of


class Tokenizer:
    """A tokenizer.json, its special tokens, and the reference encoder made from it.

    Attributes:
        json: the text of tokenizer.json.
        info: what a manifest says about it.
        added_tokens: the contents of the added tokens.
        reference: the `tokenizers.Tokenizer`, with truncation and padding switched off.
    """

    def __init__(
        self, json_text: str, reference: tokenizers.Tokenizer, special_ids: tuple[int | None, int, int]
    ) -> None:
        self.json = json_text
        self.reference = reference
        self.added_tokens = [token.content for token in self.reference.get_added_tokens_decoder().values()]
        bos_id, eos_id, pad_id = special_ids
        self.info = TokenizerInfo(
            sha256=hashlib.sha256(json_text.encode()).hexdigest(),
            vocab_size=max(self.reference.get_vocab(with_added_tokens=True).values()) + 1,
            bos_id=bos_id,
            eos_id=eos_id,
            pad_id=pad_id,
        )

    def __repr__(self) -> str:
        names = zip(("BOS", "EOS", "PAD"), self.info.special_ids, strict=True)
        special = ", ".join(
            f"no {name}" if number is None else f"{name} {number} {self.reference.id_to_token(number)!r}"
            for name, number in names
        )
        return f"Tokenizer({self.info.vocab_size:,} entries, {special}, {self.info.sha256[:12]}…)"

    def prompt_ids(self, text: str) -> list[int]:
        """Return the ids of a document that begins with this text, as it is stored: BOS, where there is one, and those of the text."""
        ids: list[int] = self.reference.encode(text, add_special_tokens=False).ids
        return ids if self.info.bos_id is None else [self.info.bos_id, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens included."""
        text: str = self.reference.decode(list(ids), skip_special_tokens=False)
        return text


BosToken = Annotated[
    str | None,
    "BOS, the token before each text, if it is not the one that tokenizer_config.json names; none stores texts without.",
]
EosToken = Annotated[str | None, "EOS, the token after each text, if it is another one; there must be one."]
PadToken = Annotated[
    str | None, "PAD, the token that fills windows, if it is another one; there must be one."
]
"""Options of what reads a tokenizer.json; `SpecialTokens` takes their values."""

NONE = "none"
"""In place of the text of BOS: there is none."""
_SPECIAL_NAMES = ("bos", "eos", "pad")
_NEEDED_FOR = {"eos": "ends every text, so that a model learns to stop", "pad": "fills windows"}
_EXAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """The texts of the tokens that frame documents and fill windows; None for those that tokenizer_config.json is to name.

    `bos` may also be `NONE`.
    """

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None


def load_tokenizer(path: Path | str | None = None, special: SpecialTokens | None = None) -> Tokenizer:
    """Load a tokenizer.json, and find its BOS, EOS and PAD.

    Args:
        path: the file, or a folder that holds one: a Hugging Face folder or one of our datasets; or a name or id that `place_of`
            knows. None takes the usual one that ships with this package.
        special: texts that override what tokenizer_config.json says.

    Raises:
        UserError: there is no such file, it is no tokenizer, or nothing says which token is BOS, EOS or PAD.
    """
    path = place_of(path)
    file = path / TOKENIZER_NAME if path.is_dir() else path
    try:
        text = file.read_bytes().decode()
    except FileNotFoundError:
        raise UserError(
            "no such file",
            where=file,
            remedy="`tokenizer` takes a tokenizer.json, or the folder of one",
            option="tokenizer",
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"not a tokenizer.json (not even UTF-8: {error.reason} at byte {error.start})", where=file
        ) from None
    reference = _parse(text, file)
    special = special or SpecialTokens()
    is_dataset = file.with_name(MANIFEST_NAME).is_file()
    recorded_ids = Manifest.read(file.parent).tokenizer.special_ids if is_dataset else None
    config = {} if is_dataset else _read_config(file.with_name(TOKENIZER_CONFIG_NAME))
    names = zip(_SPECIAL_NAMES, (special.bos, special.eos, special.pad), strict=True)
    bos_id, eos_id, pad_id = (
        recorded_ids[place]
        if token is None and recorded_ids is not None
        else _special_id(reference, name, token, config, file)
        for place, (name, token) in enumerate(names)
    )
    assert eos_id is not None
    assert pad_id is not None
    return Tokenizer(text, reference, (bos_id, eos_id, pad_id))


def _parse(text: str, path: Path) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception
        raise UserError(f"not a tokenizer that `tokenizers` can read ({error})", where=path) from None
    if getattr(tokenizer.model, "dropout", None):
        raise UserError(
            "its model has dropout, so it encodes one text in many ways",
            where=path,
            remedy="set dropout to null",
        )
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    if not ids or max(ids) >= MAX_VOCABULARY:
        raise UserError(
            f"its largest id is {max(ids, default=None)}; ids must be from 0 to {MAX_VOCABULARY - 1:,}",
            where=path,
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = parse_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"not JSON ({error})", where=path) from None
    return config if isinstance(config, dict) else {}


def _special_id(
    tokenizer: tokenizers.Tokenizer, name: str, text: str | None, config: dict[str, Any], file: Path
) -> int | None:
    """Return the id of BOS, EOS or PAD; None where there is no BOS.

    A config that names special tokens, and no BOS among them, says that there is none; one that names no token says nothing.
    """
    if name == "bos":
        names_tokens = any(f"{other}_token" in config for other in _SPECIAL_NAMES)
        if text == NONE or (text is None and names_tokens and config.get("bos_token") is None):
            return None
    elif text == NONE:
        raise UserError(
            f"`{name}_token` {NONE}: there must be one, since {name.upper()} {_NEEDED_FOR[name]}",
            where=file,
            remedy=f"pass `{name}_token` TOKEN{_examples(tokenizer)}",
            option=f"{name}_token",
        )
    if text is None:
        token = config.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text is not None and not isinstance(text, str):
            raise UserError(
                f"its {name}_token is {token!r}, not a string",
                where=file.with_name(TOKENIZER_CONFIG_NAME),
                remedy=f"pass `{name}_token` TOKEN",
                option=f"{name}_token",
            )
    if text is None:
        raise UserError(
            f"nothing says which token is {name.upper()} ({TOKENIZER_CONFIG_NAME} does not)",
            where=file,
            remedy=f"pass `{name}_token` TOKEN{_examples(tokenizer)}"
            + (f", or `{name}_token` {NONE} to store texts without" if name == "bos" else ""),
            option=f"{name}_token",
        )
    try:
        token_id: int | None = tokenizer.token_to_id(text)
    except UnicodeEncodeError:  # half a surrogate pair, as JSON can write it
        token_id = None
    if token_id is None:
        raise UserError(
            f"{name.upper()} should be {text!r}, which is not in its vocabulary",
            where=file,
            remedy=f"pass another `{name}_token` TOKEN",
            option=f"{name}_token",
        )
    return token_id


def _examples(tokenizer: tokenizers.Tokenizer) -> str:
    """Return a clause in brackets on the special tokens of a tokenizer, the first of them; empty where it has none."""
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    more = ", …" if len(special) > _EXAMPLES else ""
    return f" (it has {', '.join(special[:_EXAMPLES])}{more})" if special else ""


def same_encoding(one: str, other: str) -> bool:
    """Tell whether two tokenizer.json make the same ids of every text, however they are written.

    They do if everything that decides about ids is the same. The special tokens that a library adds around a text do not count, since
    nothing here has them added.
    """
    return _decisive_parts(one) == _decisive_parts(other)


def refuse_other_tokenizer(
    one: tuple[Path | str, TokenizerInfo | None],
    other: tuple[Path | str, TokenizerInfo | None],
    *,
    why: str,
    remedy: str = "tokenize one of them again with the other's, by mm-data tokenize `tokenizer` DIR",
    same: Callable[[], bool] = lambda: False,
) -> None:
    """Refuse two things that do not have the same tokenizer.

    Args:
        one: the name of the first, and what is known of its tokenizer.
        other: the same of the second.
        why: why they must have the same, as a clause.
        remedy: what to do.
        same: asked where what is known differs; tells whether the tokenizers make the same ids for all that.

    Raises:
        UserError: they are different; the message shows both.
    """
    if one[1] == other[1] or same():
        return
    descriptions = [f"{name}{_in_brackets(info)}" for name, info in (one, other)]
    raise UserError(
        f"{descriptions[0]} and {descriptions[1]} have different tokenizers, and {why}", remedy=remedy
    )


def _in_brackets(info: TokenizerInfo | None) -> str:
    if info is None:
        return ""
    checksum = f", {info.sha256[:12]}…" if info.sha256 else ""
    return f" ({info.vocab_size:,} entries, {info.special_ids_in_words}{checksum})"


def _decisive_parts(json_text: str) -> dict[str, Any]:
    content = json.loads(_parse(json_text, Path(TOKENIZER_NAME)).to_str())
    parts = {name: content[name] for name in ("normalizer", "pre_tokenizer", "model")}
    return parts | {"added_tokens": {token["content"]: token["id"] for token in content["added_tokens"]}}


@functools.lru_cache(maxsize=2)
def cached_tokenizer(json_text: str, info: TokenizerInfo) -> Tokenizer:
    """Return a tokenizer from its JSON text, made once per process."""
    return Tokenizer(json_text, _parse(json_text, Path(TOKENIZER_NAME)), info.special_ids)
