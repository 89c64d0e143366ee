"""The functions that an assistant may call, from a file: a JSON list of their schemas, as requests to OpenAI's API have them.

    [{"type": "function", "function": {"name": "weather", "parameters": {…}}}]

The bare form without `type`, as many datasets have it, is taken too. A template writes either as it stands.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minimind_data.chat.messages import BadConversationError, list_of_objects
from minimind_data.errors import UserError


def read_tools(path: Path | str) -> list[dict[str, Any]]:
    """Return the schemas of functions in a file.

    Args:
        path: of the file.

    Raises:
        UserError: it cannot be read, or holds no such list.
    """
    try:
        text = Path(path).read_bytes().decode()
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror})", where=path, remedy=_REMEDY, option="tools"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"no UTF-8 ({error.reason} at byte {error.start})", where=path) from None
    try:
        tools = list_of_objects(text, "the file")
    except BadConversationError as error:
        raise UserError(str(error), where=path, option="tools") from None
    if not tools:
        raise UserError("holds no function", where=path, remedy=_REMEDY, option="tools")
    for number, tool in enumerate(tools, 1):
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise UserError(
                f"function {number} has no name",
                where=path,
                remedy='write {"type": "function", "function": {"name": …, "parameters": {…}}}',
                option="tools",
            )
    return tools


_REMEDY = "`tools` takes a file with a JSON list of functions' schemas"
