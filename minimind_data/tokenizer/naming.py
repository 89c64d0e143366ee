"""A tokenizer as a person names it: where it comes from, of what kind it is, and how large.

Datasets record the checksum of their tokenizer, not its path: two datasets of the same tokens must not differ. So only those tokenizers
have a name whose checksum is known here.
"""

import functools
import json
from typing import Any

from minimind_data.dataset.format import TOKENIZER_NAME, TokenizerInfo
from minimind_data.files import sha256_of
from minimind_data.tokenizer.places import SHIPPED, USUAL


@functools.cache
def shipped_sha256(name: str) -> str:
    """Return the SHA-256 of the tokenizer.json of a tokenizer that ships with this package."""
    return sha256_of(SHIPPED[name] / TOKENIZER_NAME)


def is_usual(info: TokenizerInfo) -> bool:
    """Tell whether a tokenizer is the one that is used by default."""
    return info.sha256 == shipped_sha256(USUAL)


def name_of(info: TokenizerInfo) -> str | None:
    """Return the name of a tokenizer that ships with this package; None of any other."""
    return next((name for name in SHIPPED if info.sha256 == shipped_sha256(name)), None)


def summary_of(info: TokenizerInfo) -> str:
    """Return its name, where that is known, its size and the beginning of its checksum."""
    size = f"{info.vocab_size:,} entries, {info.sha256[:12]}…"
    name = name_of(info)
    return f"one of {size}" if name is None else f"{name} ({size})"


def description_of(info: TokenizerInfo, json_text: str) -> str:
    """Return all that is known of the tokenizer of a dataset, in a line.

    Args:
        info: what the manifest says of it.
        json_text: the text of tokenizer.json; empty where there is none.
    """
    name = name_of(info)
    parts = [] if name is None else [name]
    parts += [kind] if (kind := kind_of_tokenizer(json_text)) else []
    parts.append(f"{info.vocab_size:,} entries")
    names = zip(("BOS", "EOS", "PAD"), info.special_ids, strict=True)
    parts += [_special_token(name, token_id, json_text) for name, token_id in names]
    parts.append(f"{info.sha256[:12]}…")
    return ", ".join(parts) + (" (it is not recorded where it came from)" if name is None else "")


def _special_token(name: str, token_id: int | None, json_text: str) -> str:
    if token_id is None:
        return f"no {name}"
    text = text_of_token(json_text, token_id)
    return f"{name} {token_id}" if text is None else f"{name} {text} ({token_id})"


def kind_of_tokenizer(json_text: str) -> str:
    """Return what kind of tokenizer the text of a tokenizer.json is, such as `byte-level BPE`; empty where it does not say."""
    try:
        content = json.loads(json_text)
        kind = str(content["model"]["type"])
    except (ValueError, RecursionError, LookupError, TypeError):
        return ""
    return f"byte-level {kind}" if _uses_bytes(content) else kind


def _uses_bytes(content: dict[str, Any]) -> bool:
    steps = [content.get("pre_tokenizer"), content.get("decoder")]
    for step in steps:
        if isinstance(step, dict):
            nested = step.get("pretokenizers") or step.get("decoders") or []
            steps += nested if isinstance(nested, list) else []
            if step.get("type") == "ByteLevel":
                return True
    return False


def text_of_token(json_text: str, number: int) -> str | None:
    """Return the text of an added token, as BOS, EOS and PAD are, by its id; None where the tokenizer has no such."""
    try:
        tokens = json.loads(json_text)["added_tokens"]
        return next((str(token["content"]) for token in tokens if token["id"] == number), None)
    except (ValueError, RecursionError, LookupError, TypeError):
        return None
