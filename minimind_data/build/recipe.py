"""A recipe: what decides the bytes of a dataset besides its inputs."""

from dataclasses import asdict, dataclass
from typing import Any, Self

from minimind_data.build.plan import TokenizeOptions
from minimind_data.chat.encoding import ChatEncoding
from minimind_data.dataset.format import Kind, Manifest, TokenizerInfo
from minimind_data.files import sha256_of_bytes
from minimind_data.json_fields import FiniteJson
from minimind_data.tokenizer.loading import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the bytes of a dataset besides its inputs. A build only goes on with what its own recipe has made."""

    kind: Kind
    tokenizer: TokenizerInfo
    options: dict[str, FiniteJson]
    """Those that shape the tokens or the cut into shards, by name, as JSON holds them."""

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> Self:
        """Return the recipe that a finished dataset was made by."""
        return cls(kind=manifest.kind, tokenizer=manifest.tokenizer, options=manifest.options)

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON holds it."""
        return asdict(self)


def recipe_of(options: TokenizeOptions, tokenizer: Tokenizer, chat: ChatEncoding | None) -> Recipe:
    """Return the recipe of a build.

    Args:
        options: of the build.
        tokenizer: of its dataset.
        chat: how conversations become tokens, where the records are some.
    """
    shaping = asdict(options.records)
    if chat is not None:
        shaping = {
            "max_word_chars": options.records.max_word_chars,
            "chat_template_sha256": sha256_of_bytes(chat.rendering.template.config_json.encode()),
            **options.chat.shaping,
        }
    return Recipe(
        kind=options.kind,
        tokenizer=tokenizer.info,
        options={
            **shaping,
            "format": options.format,
            "split_bytes": options.split_bytes,
            "val_fraction": options.val_fraction,
            "dedup": options.dedup,
        },
    )
