"""Object stores (`s3://`, `gs://`, `abfs://`, …) through pyarrow's file systems: what a URI stands for, and how to open it.

Credentials come from the environment or from the URI; they are never shown and never written to a file. `AWS_ENDPOINT_URL` and
`?endpoint_override=HOST:PORT&scheme=http&region=…` name another server than Amazon's.

Source of the URIs' options: https://arrow.apache.org/docs/python/filesystems.html.
"""

import contextlib
import fnmatch
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import parse_qsl, quote, unquote, urlencode

from minimind_data.errors import UserError

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_WILD = re.compile(r"[*\[]")  # `?` begins a query
_PORT = re.compile(r"[^/?@:]*:\d+(/|\?|$)")
_NO_SECRETS = frozenset((
    "allow_bucket_creation", "allow_bucket_deletion", "blob_storage_authority", "blob_storage_scheme", "dfs_storage_authority",
    "dfs_storage_scheme", "enable_tls", "endpoint_override", "project_id", "region", "retry_limit_seconds", "scheme",
))  # fmt: skip
_REBUILT = frozenset(("endpoint_override", "region", "scheme"))
_TRIES = 4
"""Of a request to S3. With so many, a server that refuses connections costs 4 seconds, one that never answers 20."""
_SHORTEST_SECRET = 4


def is_uri(location: str) -> bool:
    """Tell a URI from a path."""
    return _URI.match(location) is not None


def _cut(uri: str) -> tuple[str, str, str, str]:
    """Return (scheme with ://, credentials with @ or nothing, bucket and key, query)."""
    start = uri.index("://") + 3
    scheme, rest = uri[:start], uri[start:]
    authority = re.split(r"[/?]", rest, maxsplit=1)[0]
    is_s3 = scheme.lower() == "s3://"
    end = 0
    if "@" in authority:
        end = authority.rfind("@") + 1
        if ":" not in authority[:end] and not is_s3:
            end = 0  # a container of Azure's, a user of HDFS
    elif ":" in authority and "@" in rest and (is_s3 or not _PORT.match(rest)):
        # A secret with an unescaped / or ? in it: no URI, but the sentence that says so must not show it.
        end = (rest.partition("?")[0].rfind("@") + 1) or rest.rfind("@") + 1
    path, _, query = rest[end:].partition("?")
    return scheme, rest[:end], path, query


def shown(uri: str) -> str:
    """Return a URI as messages and manifests show it: without credentials and options."""
    scheme, _, path, _ = _cut(uri)
    return scheme + path


def without_secrets(uri: str) -> str:
    """Return a URI of the same place without credentials, which then must come from the environment."""
    scheme, _, path, query = _cut(uri)
    options = [
        (name, re.sub(r"[^/]*@", "", value))
        for name, value in parse_qsl(query, keep_blank_values=True)
        if name in _NO_SECRETS
    ]
    return _with_query(scheme + path, urlencode(options))


def name_of(uri: str) -> str:
    """Return the name of a file without its folders, as the store has it."""
    return PurePosixPath(unquote(_cut(uri)[2])).name


@contextlib.contextmanager
def reaching(uri: str) -> Iterator[None]:
    """Turn what goes wrong with a store inside the block into a UserError about a URI."""
    try:
        yield
    except Exception as error:
        if not is_of_reading(error):
            raise
        raise UserError(
            f"cannot be reached ({without_its_secrets(first_line(error), uri)})",
            where=shown(uri),
            remedy="check the address, the credentials and the region",
        ) from None


def without_its_secrets(text: str, uri: str) -> str:
    """Return a message without the credentials in a URI."""
    _, credentials, _, query = _cut(uri)
    secrets = [credentials.rstrip("@"), *re.findall(r"//([^/@]+)@", unquote(query))]
    secrets += [value for name, value in parse_qsl(query) if name not in _NO_SECRETS]
    secrets += [part for secret in secrets for part in secret.split(":")]
    text = text.replace(uri, shown(uri)).replace(_escaped(uri), shown(uri))
    for secret in sorted({*secrets, *map(unquote, secrets)}, key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, "…")
    return text


def filesystem(uri: str) -> tuple[Any, str]:
    """Return pyarrow's file system for a URI, and the path in it.

    Raises:
        UserError: there is none, or the region of a bucket cannot be determined.
    """
    from pyarrow import fs  # noqa: PLC0415 - takes a tenth of a second

    with reaching(uri):
        store, path = fs.FileSystem.from_uri(_escaped(uri))
        scheme, credentials, _, query = _cut(uri)
        options = dict(parse_qsl(query))
        if scheme.lower() != "s3://" or options.keys() - _REBUILT:
            return store, path
        # The same with fewer tries: otherwise a server that never answers would keep us waiting for minutes.
        user, _, secret = credentials.rstrip("@").partition(":")
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        options.setdefault("endpoint_override", endpoint or "")
        options["region"] = options.get("region") or store.region
        bounded = fs.S3FileSystem(
            access_key=unquote(user) or None,
            secret_key=unquote(secret) or None,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_TRIES),
            **{name: value for name, value in options.items() if value},
        )
        return bounded, path


def open_file(uri: str) -> BinaryIO:
    """Open an object for reading in ranges.

    Raises:
        UserError: it cannot be opened.
    """
    store, path = filesystem(uri)
    with reaching(uri):
        try:
            return cast("BinaryIO", store.open_input_file(path))
        except FileNotFoundError:
            raise UserError("no such file", where=shown(uri)) from None


def stamp(uri: str) -> tuple[int, int]:
    """Return (size in bytes, time of the last change in nanoseconds, 0 where that is not known)."""
    store, path = filesystem(uri)
    with reaching(uri):
        info = store.get_file_info(path)
    return int(info.size or 0), int(info.mtime_ns or 0)


def files(uri: str) -> tuple[list[str], bool]:
    """Find what a URI stands for: a file, the files below a prefix sorted by name, or those that match `*`, `[…]` and `**`.

    Returns:
        (URIs, whether `uri` is a prefix).

    Raises:
        UserError: nothing is there, or it cannot be reached.
    """
    from pyarrow import fs  # noqa: PLC0415 - takes a tenth of a second

    scheme, credentials, path, query = _cut(uri)
    folder, patterns = path.rstrip("/"), None
    wild = _WILD.search(path)
    if wild is None or folder[: wild.start()].strip("/"):
        store, place = filesystem(uri)
        with reaching(uri):
            info = store.get_file_info(place)
        if info.type == fs.FileType.File:  # even if its name has a * in it
            return [uri], False
        if info.type == fs.FileType.NotFound and wild is None:
            raise UserError("no such file", where=shown(uri), remedy="check the bucket and the key")
    if wild is not None:
        folder = path[: max(0, path.rfind("/", 0, wild.start()))]
        patterns = [_pattern(part) for part in path[len(folder) :].strip("/").split("/")]
    if not folder and scheme.lower() != "file://":
        raise UserError("names no bucket", where=shown(uri), remedy="name one, and files in it")
    base = scheme + credentials + folder
    store, place = filesystem(_with_query(f"{base}/", query))
    with reaching(uri):
        infos = store.get_file_info(fs.FileSelector(place.rstrip("/"), recursive=True))
    inside = sorted(
        info.path[len(place.rstrip("/")) :].strip("/") for info in infos if info.type == fs.FileType.File
    )
    if patterns is None:
        chosen = [one for one in inside if not any(part.startswith(".") for part in one.split("/"))]
    else:
        chosen = [one for one in inside if _matches(one.split("/"), patterns)]
    if not chosen and patterns is not None:
        raise UserError("no file matches", where=shown(uri))
    return [_with_query(f"{base}/{quote(one)}", query) for one in chosen], patterns is None


def _pattern(part: str) -> str:
    """Return a part of a glob as fnmatch reads it; what is escaped in the URI stands for itself."""
    return unquote(
        re.sub(r"%(2A|5B|3F)", lambda escape: f"[{unquote(escape[0])}]", part, flags=re.IGNORECASE)
    )


def _matches(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    """Match part by part, as a shell does: `**` stands for any folders, and only a dot matches a dot at the start of a name."""
    if not patterns:
        return not parts
    if patterns[0] == "**":
        if len(patterns) == 1:
            return not any(part.startswith(".") for part in parts)
        return _matches(parts, patterns[1:]) or (
            bool(parts) and not parts[0].startswith(".") and _matches(parts[1:], patterns)
        )
    if not parts or (parts[0].startswith(".") and not patterns[0].startswith(".")):
        return False
    return fnmatch.fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])


def _with_query(uri: str, query: str) -> str:
    return f"{uri}?{query}" if query else uri


def _escaped(uri: str) -> str:
    """Escape what a key may hold and a URI may not: white space, letters beyond ASCII, brackets, and #, which begins no fragment here."""
    scheme, credentials, path, query = _cut(uri)
    return _with_query(scheme + credentials + quote(path, safe="/%:@!$&'()*+,;=~-._"), query)


def is_of_reading(error: Exception) -> bool:
    """Tell whether an error comes from the system or from pyarrow, whose errors have several unrelated bases."""
    if isinstance(error, BrokenPipeError):
        return False
    return isinstance(error, OSError) or type(error).__module__.startswith("pyarrow")


def first_line(error: BaseException) -> str:
    """Return the message of an error, in one line."""
    text = getattr(error, "strerror", None) or str(error)
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__
