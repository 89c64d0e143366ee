"""Functions that an assistant may call, from a file."""

import json

import pytest

from minimind_data.chat.tools import read_tools
from minimind_data.errors import UserError

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("tools", [[TOOL], [TOOL["function"]], [TOOL, {"name": "time"}]])
def test_functions_are_returned_as_they_stand(tmp_path, tools):
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    assert read_tools(tmp_path / "tools.json") == tools


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "holds no function; `tools` takes a file with a JSON list"),
        (b"[]", "holds no function"),
        (b"[1]", "the file is a list, not a list of objects"),
        (b"[{", "the file is"),
        (b"\xff", "no UTF-8"),
        (b'[{"name": "a"}, {"type": "function", "function": "b"}]', "function 2 has no name; write"),
        (b'[{"name": ""}]', "function 1 has no name"),
        (b'[{"name": "a", "x": NaN}]', "NaN"),
    ],
)
def test_anything_else_is_refused_in_a_sentence(tmp_path, content, complaint):
    path = tmp_path / "tools.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as refusal:
        read_tools(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert complaint in str(refusal.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_tools(tmp_path / "none.json")
