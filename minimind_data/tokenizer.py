"""The tokenizer of a dataset, and the backends that encode with it.

The law is one sentence: the ids of a text are what Hugging Face `tokenizers` gives for
`encode(text, add_special_tokens=False)`, special tokens in the text recognised. `ReferenceEncoder` is that library.
`FastokensEncoder` is many times faster and is trusted for nothing: `choose_backend` lets it work only after it has agreed
with the reference on a battery of hard strings and on a sample of the input, for the very tokenizer at hand, and the build
goes on comparing a fraction of the documents while it runs.

Source of the file format: https://huggingface.co/docs/tokenizers (tokenizer.json), and transformers' tokenizer_config.json.
"""

import functools
import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray

from minimind_data.battery import hard_strings
from minimind_data.chat import DEFAULT_TOKENIZER
from minimind_data.errors import UserError
from minimind_data.format import (
    CONFIG_NAME,
    MANIFEST_NAME,
    MAX_VOCABULARY,
    TOKENIZER_NAME,
    Manifest,
    TokenizerInfo,
)

Backend = Literal["auto", "fastokens", "tokenizers"]
# The encoder's caches grow with the text it has seen; a fresh one now and then bounds them and costs 0.1 s a time.
_FASTOKENS_RENEWAL_TOKENS = 128 * 2**20

Ids = NDArray[np.uint32]
Offsets = NDArray[np.int64]


class Tokenizer:
    """A tokenizer.json, its special tokens, and the reference encoder made from it.

    Attributes:
        json: the text of tokenizer.json.
        info: what a manifest says of it.
        added_tokens: the contents of the added tokens.
        reference: the `tokenizers.Tokenizer`, with truncation and padding switched off.
    """

    def __init__(
        self, json_text: str, reference: tokenizers.Tokenizer, special_ids: tuple[int, int, int]
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

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens shown."""
        text: str = self.reference.decode(list(ids), skip_special_tokens=False)
        return text


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """The texts of the tokens that frame and fill documents; None where tokenizer_config.json is to say."""

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None


def load_tokenizer(path: Path | None = None, special: SpecialTokens | None = None) -> Tokenizer:
    """Load a tokenizer.json and find out its BOS, EOS and PAD.

    Args:
        path: the file, or a folder that holds one: a Hugging Face folder or one of our datasets. None takes the default
            tokenizer that ships with this package.
        special: texts that override what tokenizer_config.json says.

    Raises:
        UserError: no such file, not a tokenizer, or BOS, EOS or PAD cannot be known; the message names the flag to pass.
    """
    path = DEFAULT_TOKENIZER if path is None else path
    file = path / TOKENIZER_NAME if path.is_dir() else path
    try:
        text = file.read_bytes().decode()
    except FileNotFoundError:
        raise UserError(
            f"{file}: no such file; --tokenizer takes a tokenizer.json or the folder of one"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not a tokenizer.json (not even UTF-8: {error.reason} at byte {error.start})"
        ) from None
    reference = _parse(text, file)
    special = special or SpecialTokens()
    special_ids = _ids_of_dataset(file) if file.with_name(MANIFEST_NAME).is_file() else {}
    config = {} if special_ids else _read_config(file.with_name(CONFIG_NAME))
    ids = [
        special_ids[name]
        if text is None and special_ids
        else _special_id(reference, name, text, config, file)
        for name, text in (("bos", special.bos), ("eos", special.eos), ("pad", special.pad))
    ]
    return Tokenizer(text, reference, (ids[0], ids[1], ids[2]))


def _ids_of_dataset(file: Path) -> dict[str, int]:
    """Return the special ids that the manifest beside this tokenizer.json names."""
    info = Manifest.read(file.parent).tokenizer
    return {"bos": info.bos_id, "eos": info.eos_id, "pad": info.pad_id}


def _parse(text: str, path: Path) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception
        raise UserError(f"{path}: not a tokenizer that `tokenizers` can read ({error})") from None
    if getattr(tokenizer.model, "dropout", None):
        raise UserError(
            f"{path}: its model has dropout, so it encodes one text in many ways; set dropout to null"
        )
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    if not ids or max(ids) >= MAX_VOCABULARY:
        raise UserError(
            f"{path}: its largest id is {max(ids, default=None)}; ids must be from 0 to {MAX_VOCABULARY - 1:,}"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    return config if isinstance(config, dict) else {}


def _special_id(
    tokenizer: tokenizers.Tokenizer, name: str, text: str | None, config: dict[str, Any], file: Path
) -> int:
    if text is None:
        token = config.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text is not None and not isinstance(text, str):
            raise UserError(
                f"{file.with_name(CONFIG_NAME)}: its {name}_token is {token!r}, not a string; pass --{name}-token TOKEN"
            )
    if text is None:
        raise UserError(
            f"{file}: which token is {name.upper()} is said nowhere ({CONFIG_NAME} is silent); pass --{name}-token TOKEN"
        )
    token_id: int | None = tokenizer.token_to_id(text)
    if token_id is None:
        raise UserError(
            f"{file}: {name.upper()} should be {text!r}, which is not in its vocabulary; pass another --{name}-token TOKEN"
        )
    return token_id


def same_encoding(one: str, other: str) -> bool:
    """Tell whether two tokenizer.json make the same ids of every text, however they are written.

    They do where all that decides it is the same: special tokens that a library adds around a text are left out of account, as
    nothing here has them added.
    """
    return _decisive_parts(one) == _decisive_parts(other)


def _decisive_parts(json_text: str) -> dict[str, Any]:
    content = json.loads(_parse(json_text, Path(TOKENIZER_NAME)).to_str())
    parts = {name: content[name] for name in ("normalizer", "pre_tokenizer", "model")}
    return parts | {"added_tokens": {token["content"]: token["id"] for token in content["added_tokens"]}}


class Encoder(Protocol):
    """Texts to ids, many at a time, for any number of threads."""

    name: str

    def encode_batch(self, texts: list[str]) -> tuple[Ids, Offsets]:
        """Return (ids uint32 [T], offsets int64 [len(texts) + 1]): text i is ids[offsets[i]:offsets[i + 1]]."""
        ...


class ReferenceEncoder:
    """Hugging Face `tokenizers`: what the ids are, by definition."""

    name = "tokenizers"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer.reference

    def encode_batch(self, texts: list[str]) -> tuple[Ids, Offsets]:
        """Encode; see `Encoder`.

        Raises:
            UserError: a text holds something that this tokenizer has no token for.
        """
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # noqa: BLE001 - the library raises plain Exception
            raise UserError(
                f"the tokenizer cannot encode some text ({error}); give it an unknown token, or take another --tokenizer"
            ) from None
        ids = [np.array(encoding.ids, np.uint32) for encoding in encodings]
        offsets = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(one) for one in ids], out=offsets[1:])
        return np.concatenate([*ids, np.empty(0, np.uint32)]), offsets


class FastokensEncoder:
    """The `fastokens` library: the same ids, twenty to forty times as fast, as two byte buffers without Python lists."""

    name = "fastokens"

    def __init__(self, tokenizer: Tokenizer) -> None:
        import fastokens  # noqa: PLC0415 - optional where it has no wheels

        def make() -> Any:
            encoder = fastokens.Tokenizer.from_json_str(tokenizer.json)
            encoder.no_truncation()
            encoder.no_padding()
            return encoder

        self._make: Callable[[], Any] = make
        self._encoder = make()
        self._num_tokens = 0
        self._lock = threading.Lock()

    def encode_batch(self, texts: list[str]) -> tuple[Ids, Offsets]:
        """Encode; see `Encoder`. Threads may call this at the same time, and share the caches."""
        with self._lock:
            if self._num_tokens > _FASTOKENS_RENEWAL_TOKENS:
                self._encoder = self._make()
                self._num_tokens = 0
            encoder = self._encoder
        ids, offsets = encoder.encode_batch_flat(texts)
        with self._lock:
            self._num_tokens += len(ids) // 4
        return np.frombuffer(ids, "<u4"), np.frombuffer(offsets, "<u8").astype(np.int64)


FAST_BACKENDS: dict[str, Callable[[Tokenizer], Encoder]] = {"fastokens": FastokensEncoder}


def make_encoder(tokenizer: Tokenizer, name: str) -> Encoder:
    """Return the encoder of this name, without any check."""
    return ReferenceEncoder(tokenizer) if name == "tokenizers" else FAST_BACKENDS[name](tokenizer)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which backend does the work, and why, in words for the user."""

    name: str
    note: str


def choose_backend(tokenizer: Tokenizer, wanted: Backend, sample: list[str]) -> Choice:
    """Return the fastest backend that agrees with the reference on the battery and on `sample`.

    Raises:
        UserError: a fast backend was asked for by name and cannot be had or does not agree.
    """
    if wanted == "tokenizers":
        return Choice(name="tokenizers", note="the reference, as asked for")
    refusals = []
    for name in FAST_BACKENDS if wanted == "auto" else [wanted]:
        refusal = _refusal(tokenizer, name, sample)
        if refusal is None:
            return Choice(
                name=name, note=f"agrees with tokenizers on the hard strings and {len(sample)} sample texts"
            )
        refusals.append(f"{name} {refusal}")
    if wanted != "auto":
        raise UserError(f"--backend {wanted}: {'; '.join(refusals)}; take --backend auto or tokenizers")
    return Choice(name="tokenizers", note=f"the slow reference, because {'; '.join(refusals)}")


def _refusal(tokenizer: Tokenizer, name: str, sample: list[str]) -> str | None:
    """Say why a fast backend may not be used, or None where it may."""
    texts = hard_strings(tokenizer.added_tokens) + sample
    try:
        encoder = make_encoder(tokenizer, name)
        different = first_difference(tokenizer, texts, *encoder.encode_batch(texts))
    except ImportError:
        return "is not installed"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - a panic in Rust is no Exception; whatever it is, the reference works
        return f"failed with this tokenizer ({type(error).__name__}: {error})"
    return None if different is None else f"gives other ids than tokenizers for {texts[different][:40]!r}"


def first_difference(tokenizer: Tokenizer, texts: list[str], ids: Ids, offsets: Offsets) -> int | None:
    """Return the first text whose ids are not the reference's, or None.

    Args:
        tokenizer: whose reference decides.
        texts: what was encoded.
        ids: uint32 [T], as `Encoder.encode_batch` gave them.
        offsets: int64 [len(texts) + 1], likewise.
    """
    wanted_ids, wanted_offsets = ReferenceEncoder(tokenizer).encode_batch(texts)
    if np.array_equal(offsets, wanted_offsets) and np.array_equal(ids, wanted_ids):
        return None
    found = [ids[start:stop] for start, stop in itertools.pairwise(offsets)]
    wanted = [wanted_ids[start:stop] for start, stop in itertools.pairwise(wanted_offsets)]
    return next(i for i in range(len(texts)) if not np.array_equal(found[i], wanted[i]))


@functools.lru_cache(maxsize=2)
def cached_tokenizer(json_text: str, info: TokenizerInfo) -> Tokenizer:
    """Return a tokenizer from its JSON text, made once per process."""
    return Tokenizer(
        json_text, _parse(json_text, Path(TOKENIZER_NAME)), (info.bos_id, info.eos_id, info.pad_id)
    )
