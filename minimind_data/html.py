"""Pages that need nothing but themselves: a template, data inside it, and a policy that lets it load nothing and run no other script."""

import base64
import hashlib
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

_BASE_NAME = "page_base.html"


def read_template(package: str, name: str) -> str:
    """Return the template of a page: its title, style, body and script, put into the page that all share, `page_base.html`.

    Args:
        package: the package that the file lies in.
        name: the file's name. It holds one of each of these elements, in this order.
    """
    own = resources.files(package).joinpath(name).read_text("utf-8")
    template = resources.files("minimind_data").joinpath(_BASE_NAME).read_text("utf-8")
    for part in ("title", "style", "body", "script"):
        match = re.search(rf"<{part}>\n?(.*?)</{part}>", own, re.DOTALL)
        assert match is not None, (name, part)
        template = template.replace(f"@{part}@", match[1])
    return template


def is_page(path: Path) -> bool:
    """Tell whether a file is a page made here, which a newer one may replace."""
    base = resources.files("minimind_data").joinpath(_BASE_NAME).read_bytes()
    beginning = base[: base.index(b"@")]
    with path.open("rb") as file:
        return file.read(len(beginning)) == beginning


def fill(template: str, data: dict[str, Any], *, connects: bool = False) -> str:
    """Put data into a page, and the hashes of its own script and style into its policy.

    Args:
        template: from `read_template`.
        data: what its script shows.
        connects: whether its script may ask the server that it came from.
    """
    # What ends a script element, or a line of script, can only stand inside JSON strings, where an escape means the same.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    for name in ("style", "script"):
        match = re.search(rf"<{name}>(.*?)</{name}>", template, re.DOTALL)
        assert match is not None
        digest = base64.b64encode(hashlib.sha256(match[1].encode()).digest()).decode()
        template = template.replace(f"@{name}-hash@", f"'sha256-{digest}'")
    template = template.replace("@connect-src@", "'self'" if connects else "'none'")
    before, after = template.split("@data@")
    return before + text + after
