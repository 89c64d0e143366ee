"""Text to memory-mapped datasets of token ids, and windows over them. Never imports torch.

    files --> records --> token ids --> shards, manifest --> windows --> batches
    inputs    inputs      tokenizer     dataset              windows     minimind_train.batches
              chat (conversations)

`build` drives the way to the shards, in parallel and so that it can be interrupted anywhere; `interchange` reads and writes the token
files of other projects; `report` shows what a dataset holds.

    from minimind_data import ShardSet, TokenizeOptions, open_windows, tokenize

    tokenize(["data/sample.jsonl"], TokenizeOptions(out="data/mine"))
    windows = open_windows(ShardSet.open("data/mine"), layout="pack", seq_len=512)
    windows[0]["input_ids"]  # int64 [512]

The names of `__all__` are the public ones. Each is imported when it is asked for, so that importing the package costs nothing.
"""

from typing import TYPE_CHECKING, Any

from minimind_data.lazy_names import importing, module_of_each

if TYPE_CHECKING:
    from minimind_data.build.pipeline import commit, tokenize
    from minimind_data.build.plan import TokenizeOptions
    from minimind_data.chat.rendering import ChatOptions
    from minimind_data.chat.template import ChatTemplate, chat_template_of, render_chat
    from minimind_data.dataset.format import IGNORED, FormatError, Manifest
    from minimind_data.dataset.merging import MergeOptions, merge
    from minimind_data.dataset.shard_set import ShardSet
    from minimind_data.dataset.shuffling import ShuffleOptions, shuffle
    from minimind_data.dataset.verification import verify
    from minimind_data.dataset.writer import ShardWriter
    from minimind_data.errors import UserError
    from minimind_data.inputs.spec import RecordSpec
    from minimind_data.inputs.splits import texts_of
    from minimind_data.interchange.conversion import ConvertOptions, convert
    from minimind_data.permutation import Permutation
    from minimind_data.report.statistics import stats
    from minimind_data.tokenizer.loading import SpecialTokens, Tokenizer, load_tokenizer
    from minimind_data.tokenizer.training import train_tokenizer
    from minimind_data.windows.base import Layout, LongDocuments, Windows
    from minimind_data.windows.opening import open_windows
    from minimind_data.windows.segments import Segments

    __version__: str

__all__ = [
    "IGNORED",
    "ChatOptions",
    "ChatTemplate",
    "ConvertOptions",
    "FormatError",
    "Layout",
    "LongDocuments",
    "Manifest",
    "MergeOptions",
    "Permutation",
    "RecordSpec",
    "Segments",
    "ShardSet",
    "ShardWriter",
    "ShuffleOptions",
    "SpecialTokens",
    "TokenizeOptions",
    "Tokenizer",
    "UserError",
    "Windows",
    "__version__",
    "chat_template_of",
    "commit",
    "convert",
    "load_tokenizer",
    "merge",
    "open_windows",
    "render_chat",
    "shuffle",
    "stats",
    "texts_of",
    "tokenize",
    "train_tokenizer",
    "verify",
]

_MODULES = {
    "build.pipeline": ("commit", "tokenize"),
    "build.plan": ("TokenizeOptions",),
    "chat.rendering": ("ChatOptions",),
    "chat.template": ("ChatTemplate", "chat_template_of", "render_chat"),
    "dataset.format": ("IGNORED", "FormatError", "Manifest"),
    "dataset.merging": ("MergeOptions", "merge"),
    "dataset.shard_set": ("ShardSet",),
    "dataset.shuffling": ("ShuffleOptions", "shuffle"),
    "dataset.verification": ("verify",),
    "dataset.writer": ("ShardWriter",),
    "errors": ("UserError",),
    "inputs.spec": ("RecordSpec",),
    "inputs.splits": ("texts_of",),
    "interchange.conversion": ("ConvertOptions", "convert"),
    "permutation": ("Permutation",),
    "report.statistics": ("stats",),
    "tokenizer.loading": ("SpecialTokens", "Tokenizer", "load_tokenizer"),
    "tokenizer.training": ("train_tokenizer",),
    "windows.base": ("Layout", "LongDocuments", "Windows"),
    "windows.opening": ("open_windows",),
    "windows.segments": ("Segments",),
}
_MODULE_OF = module_of_each(__name__, _MODULES)


_imported = importing(__name__, _MODULE_OF)


def _public(name: str) -> Any:
    """Import a public name; what a module's `__getattr__` is called for."""
    if name != "__version__":
        return _imported(name)
    from importlib.metadata import version  # noqa: PLC0415 - it takes longer than all else here

    value = globals()[name] = version("minimind-pipeline")
    return value


if not TYPE_CHECKING:  # a type checker knows the names by their imports, and that there are no others
    __getattr__ = _public


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
