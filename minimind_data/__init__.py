"""What is on disk: text to shards, shards to windows. Never imports torch.

The names below are the public reading side. Making datasets is `minimind_data.build.pipeline.tokenize`.
"""

from minimind_data.dataset.format import IGNORED, FormatError, Manifest
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.dataset.writer import ShardWriter
from minimind_data.errors import UserError
from minimind_data.windows.base import Layout, LongDocuments, Windows
from minimind_data.windows.opening import open_windows
from minimind_data.windows.segments import Segments

__all__ = [
    "IGNORED",
    "FormatError",
    "Layout",
    "LongDocuments",
    "Manifest",
    "Segments",
    "ShardSet",
    "ShardWriter",
    "UserError",
    "Windows",
    "open_windows",
]
