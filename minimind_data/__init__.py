"""What is on disk: text to shards, shards to windows. Never imports torch.

The names below are the public reading side. Making datasets is `minimind_data.build.tokenize`.
"""

from minimind_data.errors import UserError
from minimind_data.format import FormatError, Manifest
from minimind_data.segments import Segments
from minimind_data.shards import ShardSet
from minimind_data.windows import IGNORED, Layout, LongDocuments, Windows, open_windows
from minimind_data.writer import ShardWriter

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
