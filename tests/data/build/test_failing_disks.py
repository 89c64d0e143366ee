"""Whatever fails on the disk, and when: one sentence names the file, nothing of anybody's is lost, and the same command then does its work."""

import errno
import itertools
import shutil

import pytest

from minimind_data.build.pipeline import tokenize
from minimind_data.dataset.merging import MergeOptions, merge
from minimind_data.dataset.shuffling import ShuffleOptions, shuffle
from minimind_data.errors import UserError
from minimind_data.interchange.conversion import ConvertOptions, convert
from tests.helpers.builds import options, tree
from tests.helpers.faults import Disk

ERRORS = (errno.ENOSPC, errno.EMFILE, errno.EIO, errno.EACCES)
TEXTS = [f"w{3 + i % 40} w5" for i in range(60)]


@pytest.fixture
def tokenizer(small_tokenizer):
    (small_tokenizer / "chat_template.jinja").write_text("{{ messages }}")
    return small_tokenizer


def is_sentence(failure, home, error_number):
    """Whether a failure names a file in one line, and advises to delete none where it only could not be opened."""
    if isinstance(failure, OSError):  # what no one can foresee; the command line says it in a line of its own
        return failure.filename is not None and failure.errno not in {errno.ENOSPC, errno.EMFILE}
    said = str(failure)
    may_be_deleted = error_number in {
        errno.EIO,
        errno.ENOSPC,
    }  # these do not come where a whole file is opened
    return "\n" not in said and str(home) in said and (may_be_deleted or "delete" not in said)


def fail_everywhere(home, work, first, errors=ERRORS):
    """Let each operation of `work(home / "out")` fail in turn, then let it finish; the folder is as `first` left it, to begin with.

    Returns:
        The number of operations.
    """
    first(home / "right")
    work(home / "right")
    right = tree(home / "right")
    (home / "out.bin").write_text("somebody's")
    for fail_at in itertools.count(1):
        out = home / "out"
        if out.exists():
            shutil.rmtree(out)
        first(out)
        error_number = errors[fail_at % len(errors)]
        disk = Disk(out, fail_at, error_number)
        failure = None
        try:
            with disk.mounted():
                work(out)
        except (OSError, UserError) as error:
            failure = error
        if failure is not None:
            assert is_sentence(failure, home, error_number), (fail_at, failure)
        if not out.exists() or tree(out) != right:
            work(out)
            assert tree(out) == right, fail_at
        assert (home / "out.bin").read_text() == "somebody's"
        assert {path.name for path in home.iterdir()} == {"out", "right", "out.bin"}, fail_at
        if disk.operations < fail_at:
            return fail_at - 1
    raise AssertionError


@pytest.mark.slow
def test_a_build_and_its_growth(tmp_path, write_jsonl, tokenizer):
    (home := tmp_path / "home").mkdir()
    source, more = write_jsonl(TEXTS), write_jsonl(TEXTS[::2], "more.jsonl")
    chosen = {"split_bytes": 1024, "val_fraction": 0.2, "tokenizer": tokenizer, "backend": "tokenizers"}

    def build(inputs):
        return lambda out: tokenize(inputs, options(out, **chosen))

    assert fail_everywhere(home, build([source]), lambda out: out.mkdir()) > 40
    shutil.rmtree(home)
    home.mkdir()
    assert fail_everywhere(home, build([source, more]), build([source])) > 30


@pytest.mark.slow
@pytest.mark.parametrize("work", ["merge", "shuffle", "convert"])
def test_new_folders(tmp_path, write_jsonl, tokenizer, work):
    (home := tmp_path / "home").mkdir()
    source = write_jsonl(TEXTS)
    for name in ("a", "b"):
        tokenize([source], options(tmp_path / name, tokenizer=tokenizer, split_bytes=1024))
    calls = {
        "merge": lambda out: merge([tmp_path / "a", tmp_path / "b"], MergeOptions(out=out)),
        "shuffle": lambda out: shuffle(tmp_path / "a", ShuffleOptions(out=out, shard_bytes=256)),
        "convert": lambda out: convert(tmp_path / "a", ConvertOptions(out=out), target_format="megatron"),
    }

    def call(out):
        if not out.exists() or not any(out.iterdir()):
            calls[work](out)

    assert fail_everywhere(home, call, lambda _: None) > 5
