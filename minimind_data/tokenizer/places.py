"""Where a tokenizer is: a file or folder, one that ships with this package, or that of a model on Hugging Face, in the local cache of its hub."""

from pathlib import Path

from minimind_data.dataset.format import TOKENIZER_CONFIG_NAME, TOKENIZER_NAME
from minimind_data.errors import UserError

_FOLDER = Path(__file__).with_name("shipped")
SHIPPED = {name: _FOLDER / name for name in ("minimind3", "minimind2", "default")}
"""The folders of the tokenizers that ship with this package, by name."""
USUAL = "minimind3"
"""The name of the one that is used by default."""


def place_of(tokenizer: Path | str | None) -> Path:
    """Return the file or folder of a tokenizer.

    Args:
        tokenizer: a path that exists; the name of one that ships with this package; the id of a model on Hugging Face's hub, such as
            `Qwen/Qwen3-0.6B`, whose files are in the cache on this machine; or None for the usual one.

    Raises:
        UserError: it is none of these.
    """
    if tokenizer is None:
        return SHIPPED[USUAL]
    path = Path(tokenizer)
    if path.exists():
        return path
    if (shipped := SHIPPED.get(str(tokenizer))) is not None:
        return shipped
    if (folder := _in_cache_of_hub(str(tokenizer))) is not None:
        return folder
    hub_id = (
        ""
        if str(tokenizer).count("/") != 1
        else f"; for a model on Hugging Face, fetch its files first: `hf download {tokenizer} {TOKENIZER_NAME} {TOKENIZER_CONFIG_NAME}`"
    )
    raise UserError(
        "no such file",
        where=path,
        remedy=f"`tokenizer` takes a tokenizer.json, the folder of one, or {', '.join(SHIPPED)}{hub_id}",
        option="tokenizer",
    )


def _in_cache_of_hub(hub_id: str) -> Path | None:
    """Return the folder that a model has in the cache of Hugging Face's hub, if its tokenizer.json is there. Nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - takes long
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415

    try:
        file = try_to_load_from_cache(hub_id, TOKENIZER_NAME)
    except HFValidationError:
        return None
    return Path(file).parent if isinstance(file, str) else None
