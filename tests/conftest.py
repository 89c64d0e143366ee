"""What all tests share: a loaded machine is no failure, and neither is being started in the background."""

import signal

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("tests.helpers")

settings.register_profile("without a deadline", deadline=None)
settings.load_profile("without a deadline")

# A shell's background job ignores SIGINT and so do its children; the tests of Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Bytes are named by their parameter: some hold a time, and the workers of xdist must find the same names."""
    return argname if isinstance(val, bytes) else None
