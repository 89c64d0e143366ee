"""Encoders: texts to ids, by the reference or by a fast library that is checked against it.

`ReferenceEncoder` is Hugging Face `tokenizers`. `FastokensEncoder` is many times faster, but never simply trusted: `choose_backend`
takes it only if it agrees with the reference on the edge cases and on a sample of the input, for the tokenizer in use, and a build
keeps comparing a fraction of the documents while it runs.
"""

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from minimind_data.errors import UserError
from minimind_data.tokenizer.edge_cases import edge_case_texts
from minimind_data.tokenizer.loading import Tokenizer

Backend = Literal["auto", "fastokens", "tokenizers"]

# The encoder's caches grow with the text it has seen. Making a new encoder from time to time bounds them, and takes 0.1 s.
_FASTOKENS_RENEWAL_TOKENS = 128 * 2**20

Ids = NDArray[np.uint32]
Offsets = NDArray[np.int64]


class Encoder(Protocol):
    """Texts to ids, many at a time, for any number of threads."""

    name: str

    def encode_batch(self, texts: list[str]) -> tuple[Ids, Offsets]:
        """Return (ids uint32 [T], offsets int64 [len(texts) + 1]): text i is ids[offsets[i]:offsets[i + 1]]."""
        ...


class ReferenceEncoder:
    """Hugging Face `tokenizers`, whose ids are right by definition."""

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
                f"the tokenizer cannot encode some text ({error})",
                remedy="give it an unknown token, or take another `tokenizer`",
                option="tokenizer",
            ) from None
        ids = [np.array(encoding.ids, np.uint32) for encoding in encodings]
        offsets = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(one) for one in ids], out=offsets[1:])
        return np.concatenate([*ids, np.empty(0, np.uint32)]), offsets


class FastokensEncoder:
    """The `fastokens` library: the same ids twenty to forty times as fast, in two byte buffers instead of Python lists."""

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
    """Which backend encodes, and why, in words for the user."""

    name: str
    note: str


def choose_backend(tokenizer: Tokenizer, backend: Backend, sample: list[str]) -> Choice:
    """Return the fastest backend that agrees with the reference on the edge cases and on `sample`.

    Args:
        tokenizer: that is to encode.
        backend: `auto`, or the one that the user chose.
        sample: some texts of the input.

    Raises:
        UserError: a fast backend was chosen by name, and is not installed or does not agree.
    """
    if backend == "tokenizers":
        return Choice(name="tokenizers", note="the reference, as requested")
    refusals = []
    for name in FAST_BACKENDS if backend == "auto" else [backend]:
        refusal = _refusal(tokenizer, name, sample)
        if refusal is None:
            return Choice(
                name=name, note=f"agrees with tokenizers on the edge cases and {len(sample)} sample texts"
            )
        refusals.append(f"{name} {refusal}")
    if backend != "auto":
        raise UserError(
            f"`backend` {backend}: {'; '.join(refusals)}",
            remedy="take `backend` auto or tokenizers",
            option="backend",
        )
    return Choice(name="tokenizers", note=f"the slow reference, because {'; '.join(refusals)}")


def _refusal(tokenizer: Tokenizer, name: str, sample: list[str]) -> str | None:
    """Say why a fast backend may not be used, or None where it may."""
    texts = edge_case_texts(tokenizer.added_tokens) + sample
    try:
        encoder = make_encoder(tokenizer, name)
        different = first_difference(tokenizer, texts, *encoder.encode_batch(texts))
    except ImportError:
        return "is not installed"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - a panic in Rust is no Exception, and whatever it is, the reference can do the work
        return f"failed with this tokenizer ({type(error).__name__}: {error})"
    return None if different is None else f"gives other ids than tokenizers for {texts[different][:40]!r}"


def first_difference(tokenizer: Tokenizer, texts: list[str], ids: Ids, offsets: Offsets) -> int | None:
    """Return the number of the first text whose ids are not the reference's, or None.

    Args:
        tokenizer: whose reference decides.
        texts: what was encoded.
        ids: uint32 [T], as `Encoder.encode_batch` returned them.
        offsets: int64 [len(texts) + 1], likewise.
    """
    reference_ids, reference_offsets = ReferenceEncoder(tokenizer).encode_batch(texts)
    if np.array_equal(offsets, reference_offsets) and np.array_equal(ids, reference_ids):
        return None
    ours = [ids[start:stop] for start, stop in itertools.pairwise(offsets)]
    reference = [reference_ids[start:stop] for start, stop in itertools.pairwise(reference_offsets)]
    return next(i for i in range(len(texts)) if not np.array_equal(ours[i], reference[i]))
