"""What a build finds in its folder, finished or not: the options that it was made with, which hold for whoever goes on with it.

A command that goes on with a dataset need not repeat how it was made. What it does not say is taken from what is there, the tokenizer
included, of which a copy lies in the folder. What it does say must agree with that; else `Precedent.refuse` shows both, and the commands
that would do.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from minimind_data.build.plan import TokenizeOptions
from minimind_data.build.recipe import Recipe
from minimind_data.build.work_folder import WorkFolder
from minimind_data.chat.rendering import ChatOptions
from minimind_data.chat.template import ChatTemplate, chat_template_of
from minimind_data.dataset.format import (
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
    FormatError,
    Manifest,
)
from minimind_data.errors import UserError
from minimind_data.files import sha256_of, sha256_of_bytes
from minimind_data.inputs.spec import RecordSpec
from minimind_data.json_fields import FieldError, read_value
from minimind_data.options import KnowsPassed, flatten, format_size, leaves, names_passed, options_from
from minimind_data.tokenizer.loading import (
    NONE,
    SpecialTokens,
    Tokenizer,
    cached_tokenizer,
    load_tokenizer,
)
from minimind_data.tokenizer.naming import is_usual, summary_of, text_of_token
from minimind_data.tokenizer.places import SHIPPED, USUAL, place_of

_TEMPLATE_SHA256 = "chat_template_sha256"
_RECORDED = {"kind", "format", "split_bytes", "val_fraction", "dedup"}
_RECORDED |= {field.name for kind in (RecordSpec, ChatOptions) for field in fields(kind)} - {"chat_template"}
"""The options that a recipe records by their names. The tokenizer and the chat template it records by their checksums."""
_MADE_BY = {"merged_from": "merge", "shuffled_from": "shuffle", "converted_from": "convert"}
"""Commands that make datasets too, by what these record."""
_MAX_INPUTS_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Contradiction:
    """An option that is not what it is in the dataset that is there."""

    option: str
    there: str
    here: str
    passed_by: str = ""
    """The option that it came with, where that is another one."""

    def __str__(self) -> str:
        """Return a clause with both values."""
        return f"`{self.option}` is {self.there} there and {self.here} here"


@dataclass(frozen=True, kw_only=True)
class Precedent:
    """A dataset, or an unfinished build of which some splits are made or being made, in the folder of a build."""

    recipe: Recipe
    work: WorkFolder
    is_finished: bool
    config_sha256: str | None
    """SHA-256 of its tokenizer_config.json; None where it has none, or where an unfinished build does not record it."""

    @classmethod
    def of(cls, work: WorkFolder, manifest: Manifest | None) -> Self | None:
        """Return what is in the folder of a build; None where nothing is made there yet.

        Args:
            work: the folder.
            manifest: of the finished dataset in it, if there is one.

        Raises:
            UserError: a file of it is damaged, or it is of a kind that a build cannot go on with.
        """
        if manifest is not None:
            _refuse_other_makers(work.out, manifest)
            recipe = Recipe.of_manifest(manifest)
            return cls(
                recipe=recipe, work=work, is_finished=True, config_sha256=manifest.tokenizer_config_sha256
            )
        plan = work.plan()
        if plan is None or not work.is_begun():
            return None
        recipe = plan.recipe
        sha256 = recipe.options.get(_TEMPLATE_SHA256)
        return cls(recipe=recipe, work=work, is_finished=False, config_sha256=sha256)

    def complete(
        self, options: TokenizeOptions
    ) -> tuple[TokenizeOptions, list[Contradiction], dict[str, str]]:
        """Return options in which everything that shapes the dataset is as it is there.

        Args:
            options: as they were passed.

        Returns:
            (the options, those of them that were passed with another value, those that were not passed and whose values are no
            defaults, as a user would write them).

        Raises:
            FormatError: what is there records an option with a value that it cannot have.
        """
        flat, passed = flatten(options), names_passed(options)
        there = self._options()
        contradictions, taken = [], {}
        for name, _, default in leaves(TokenizeOptions):
            if name not in _RECORDED:
                continue
            value = there.get(name, default)
            # A field that is passed says that there is no template.
            passed_by = "field" if name == "template" and name not in passed else name
            is_passed = passed_by in passed
            if is_passed and flat[name] != value:
                contradictions.append(
                    Contradiction(
                        option=name,
                        there=_written(name, value) if name in there else f"unused (`kind` {there['kind']})",
                        here=_written(name, flat[name]),
                        passed_by=passed_by,
                    )
                )
            elif not is_passed and value != default:
                taken[name] = _written(name, value)
        if options.tokenizer is None and not is_usual(self.recipe.tokenizer):
            taken["tokenizer"] = summary_of(self.recipe.tokenizer)
        values = {name: flat[name] for name in passed - _RECORDED} | there
        try:
            return options_from(TokenizeOptions, values), contradictions, taken
        except ValueError as error:
            raise self._unreadable(str(error)) from None

    def _options(self) -> dict[str, Any]:
        """Return the options that it records, by name, each of the type that it must have."""
        recorded = {"kind": self.recipe.kind, **self.recipe.options}
        try:
            return {
                name: read_value(annotation, recorded[name], f"its option {name}")
                for name, annotation, _ in leaves(TokenizeOptions)
                if name in _RECORDED and name in recorded
            }
        except FieldError as error:
            raise self._unreadable(str(error)) from None

    def _unreadable(self, why: str) -> FormatError:
        return FormatError(
            f"holds a dataset whose options are not of this program ({why})",
            where=self.work.out,
            remedy="take another `out`",
            option="out",
        )

    def tokenizer(self, options: TokenizeOptions) -> tuple[Tokenizer, ChatTemplate | None]:
        """Return the tokenizer and its chat template: those that are named, and what is not named from the copy in the folder.

        Raises:
            UserError: as `load_tokenizer` and `chat_template_of`; or nothing is named, and the copy is missing or changed.
        """
        special = SpecialTokens(bos=options.bos_token, eos=options.eos_token, pad=options.pad_token)
        folder = None if options.tokenizer is None else _folder_of(place_of(options.tokenizer))
        if folder is not None and not self._has_tokenizer(folder):
            return load_tokenizer(options.tokenizer, special), chat_template_of(
                options.tokenizer, options.chat.chat_template
            )
        home = folder or next((one for one in self._folders() if self._has_tokenizer(one)), None)
        if home is None:
            raise self._lost(TOKENIZER_NAME)
        tokenizer = self._tokenizer_in(home, special)
        if folder is None and options.chat.chat_template is None:
            # A build that was stopped while it published may have the one file beside the shards and not yet the other.
            homes = [home] if self.is_finished else filter(self._has_tokenizer, self._folders())
            templates = (self._template(one) for one in homes)
            return tokenizer, next((one for one in templates if one is not None), None)
        template = chat_template_of(options.tokenizer or home, options.chat.chat_template)
        return tokenizer, self._template(home) if template is None else template

    def _folders(self) -> tuple[Path, ...]:
        """Return where the tokenizer that is there may lie."""
        own = (self.work.out, self.work.path) if self.is_finished else (self.work.path, self.work.out)
        return *own, self.work.val, *SHIPPED.values()

    def _has_tokenizer(self, folder: Path) -> bool:
        path = folder if folder.is_file() else folder / TOKENIZER_NAME
        return path.is_file() and sha256_of(path) == self.recipe.tokenizer.sha256

    def _tokenizer_in(self, folder: Path, special: SpecialTokens) -> Tokenizer:
        """Return the tokenizer of a folder with the special tokens that it has in the dataset, but for those that are named."""
        path = folder if folder.is_file() else folder / TOKENIZER_NAME
        tokenizer = cached_tokenizer(path.read_bytes().decode(), self.recipe.tokenizer)
        if special == SpecialTokens():
            return tokenizer
        texts = (
            NONE if token_id is None else tokenizer.reference.id_to_token(token_id)
            for token_id in self.recipe.tokenizer.special_ids
        )
        own = SpecialTokens(**dict(zip(("bos", "eos", "pad"), texts, strict=True)))
        named = {name: text for name, text in asdict(special).items() if text is not None}
        return load_tokenizer(path, replace(own, **named))

    def _template(self, home: Path) -> ChatTemplate | None:
        """Return the chat template that is there; `home` is a folder that has the tokenizer."""
        if self.config_sha256 is None:
            return None if self.is_finished else chat_template_of(home)
        for folder in self._folders():
            path = folder / TOKENIZER_CONFIG_NAME
            if not path.is_file():
                continue
            try:
                template = chat_template_of(folder)
            except UserError:  # another folder may have it whole
                continue
            if template is None:
                continue
            template = template.for_tokenizer(self.recipe.tokenizer)
            if self.config_sha256 in (sha256_of(path), sha256_of_bytes(template.config_json.encode())):
                return template
        raise self._lost(TOKENIZER_CONFIG_NAME)

    def _lost(self, name: str) -> UserError:
        return UserError(
            "missing or changed",
            where=(self.work.out if self.is_finished else self.work.path) / name,
            remedy="name the tokenizer that the dataset was made with by `tokenizer`",
            option="tokenizer",
        )

    def contradictions(
        self, recipe: Recipe, options: TokenizeOptions, tokenizer: Tokenizer
    ) -> list[Contradiction]:
        """Return in what a recipe differs from that of what is there.

        Args:
            recipe: of the build.
            options: of the build, which say what the recipe has checksums of.
            tokenizer: of the build.
        """
        there, here = self.recipe.tokenizer, recipe.tokenizer
        contradictions = []
        if there.sha256 != here.sha256:
            contradictions.append(
                Contradiction(option="tokenizer", there=summary_of(there), here=summary_of(here))
            )
        else:
            for name in ("bos", "eos", "pad"):
                ids = getattr(there, f"{name}_id"), getattr(here, f"{name}_id")
                if ids[0] != ids[1]:
                    texts = [NONE if one is None else repr(text_of_token(tokenizer.json, one)) for one in ids]
                    contradictions.append(
                        Contradiction(option=f"{name}_token", there=texts[0], here=texts[1])
                    )
        named = {"kind": self.recipe.kind, **self.recipe.options}, {"kind": recipe.kind, **recipe.options}
        for name in named[1] | named[0]:
            values = [one.get(name) for one in named]
            if values[0] == values[1]:
                continue
            if name == _TEMPLATE_SHA256:
                source = options.chat.chat_template or options.tokenizer or USUAL
                contradictions.append(
                    Contradiction(
                        option="chat_template",
                        there=f"that in {self.work.out / TOKENIZER_CONFIG_NAME}",
                        here=f"that of {source}",
                        passed_by="tokenizer" if options.chat.chat_template is None else "",
                    )
                )
            else:
                contradictions.append(
                    Contradiction(
                        option=name, there=_written(name, values[0]), here=_written(name, values[1])
                    )
                )
        return contradictions

    def refuse(
        self, contradictions: Sequence[Contradiction], inputs: Sequence[str], options: TokenizeOptions
    ) -> None:
        """Refuse to go on with other options than those that are there.

        Args:
            contradictions: between the two; without any, nothing is refused.
            inputs: of the build, as they were passed.
            options: likewise.

        Raises:
            UserError: there are some. The sentence names both values of each, and the calls that would do.
        """
        if not contradictions:
            return
        names = list(dict.fromkeys(one.passed_by or one.option for one in contradictions))
        if "tokenizer" in names:
            names += ["bos_token", "eos_token", "pad_token"]  # which are tokens of that one
        out = self.work.out
        # Another kind has other options, which follow from it.
        shown = [one for one in contradictions if one.option == "kind"] or contradictions
        differences = "; ".join(map(str, shown))
        if len(inputs) <= _MAX_INPUTS_SHOWN:
            same = f"run {_call(inputs, options, without=names)}"
            other = f"run {_call(inputs, options, out=_free_name(out))}"
        else:
            passed = [f"`{name}`" for name in names if name in names_passed(options)]
            same, other = f"leave out {' and '.join(passed)}", "take another `out`"
        if self.is_finished:
            what = f"holds a dataset that was made differently: {differences}"
            remedy = f"to add to it as it is, {same}; for a dataset of its own, {other}"
        else:
            what = f"holds an unfinished build with other options: {differences}"
            remedy = f"to finish it as it was begun, {same}; for a dataset of its own, {other}; or delete {self.work.path}"
        raise UserError(what, where=out, remedy=remedy, option=shown[0].option)


def _refuse_other_makers(out: Path, manifest: Manifest) -> None:
    """Refuse a dataset that no build made.

    Raises:
        UserError: it is one.
    """
    remedy = "take another `out`; `mm-data merge` joins two datasets"
    if "part" in manifest.options:
        raise UserError(
            f"the {manifest.options['part']} part of a dataset, which grows with that alone",
            where=out,
            remedy=f"take {out.parent} as `out`",
            option="out",
        )
    for name, command in _MADE_BY.items():
        if name in manifest.options:
            raise UserError(
                f"holds a dataset that `mm-data {command}` made, to which nothing can be added",
                where=out,
                remedy=remedy,
                option="out",
            )
    if unknown := [name for name in manifest.options if name not in _RECORDED | {_TEMPLATE_SHA256}]:
        raise UserError(
            f"holds a dataset with options that this program does not know ({', '.join(unknown)})",
            where=out,
            remedy=remedy,
            option="out",
        )


def _folder_of(path: Path) -> Path:
    """Return the path of a tokenizer without the name of its file, where that is the usual one."""
    return path.parent if path.name == TOKENIZER_NAME else path


def _written(name: str, value: Any) -> str:
    """Return the value of an option as a user writes it."""
    if name == "split_bytes" and isinstance(value, int):
        return format_size(value)
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "on", False: "off"}[value]
    return repr(value) if name in ("field", "template", "separator") else str(value)


def _call(
    inputs: Sequence[str], options: TokenizeOptions, *, without: Sequence[str] = (), out: Path | None = None
) -> str:
    """Return the call of `tokenize` that was made, without some options or with another folder, in backticks."""
    names = names_passed(options) - {*without, "out"}
    arguments = _arguments(options, names)
    place = str(out or options.out)
    return f"`tokenize({list(inputs)!r}, TokenizeOptions({', '.join([f'out={place!r}', *arguments])}))`"


def _arguments(options: KnowsPassed, names: frozenset[str] | set[str]) -> list[str]:
    arguments = []
    for field in fields(options):  # type: ignore[arg-type]
        value = getattr(options, field.name)
        if isinstance(value, KnowsPassed):
            if nested := _arguments(value, names):
                arguments.append(f"{field.name}={type(value).__name__}({', '.join(nested)})")
        elif field.name in names:
            arguments.append(f"{field.name}={str(value) if isinstance(value, Path) else value!r}")
    return arguments


def _free_name(out: Path) -> Path:
    number = 2
    while (path := out.with_name(f"{out.name}-{number}")).exists():
        number += 1
    return path
