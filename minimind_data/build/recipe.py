"""A recipe: what decides the bytes of a dataset besides its inputs."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from minimind_data.build.plan import TokenizeOptions
from minimind_data.chat.encoding import ChatEncoding
from minimind_data.chat.rendering import ChatOptions
from minimind_data.dataset.format import Kind, Manifest, TokenizerInfo
from minimind_data.files import DamagedFileError, sha256_of_bytes
from minimind_data.inputs.spec import RecordSpec, lone_surrogate
from minimind_data.json_fields import FiniteJson
from minimind_data.options import flatten, options_in_file
from minimind_data.tokenizer.loading import Tokenizer

_OF_THE_BUILD = ("format", "split_bytes", "val_fraction", "dedup")
"""Options beside those of records and of conversations that decide the bytes of a dataset."""


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
        options={**shaping, **{name: getattr(options, name) for name in _OF_THE_BUILD}},
    )


def options_of(recipe: Recipe, out: Path, path: Path, remedy: str) -> TokenizeOptions:
    """Return the options of a recipe that a file holds, with the defaults of all that shape no dataset.

    Args:
        recipe: as it was read.
        out: the folder of the dataset.
        path: of the file.
        remedy: what the user can do if a value is not what its option takes.

    Raises:
        UserError: there is such a value, or half a surrogate pair in a text, which no manifest can hold.
    """
    names = {*_OF_THE_BUILD, *flatten(RecordSpec()), *ChatOptions().shaping}
    values = {name: value for name, value in recipe.options.items() if name in names}
    for name, value in values.items():
        if isinstance(value, str) and (why := lone_surrogate(value, name)) is not None:
            raise DamagedFileError.of(path, why, remedy)
    options = options_in_file(TokenizeOptions, {**values, "kind": recipe.kind}, path, remedy=remedy)
    return replace(options, out=out)
