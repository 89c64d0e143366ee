"""A few of the trials of `python -m tests.hostile`, which makes thousands; and that a trial notices what must not be."""

import shutil
import time

import pytest

from minimind_data.errors import UserError
from tests.hostile import trial
from tests.hostile.targets import TARGETS, make_all
from tests.hostile.trial import outcome_of, run_trial

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folders that are changed, as they were made."""
    folder = tmp_path_factory.mktemp("home")
    make_all(folder)
    return folder


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_hostile_gets_through(home, tmp_path, name):
    for seed in range(2):
        result = run_trial(name, seed, home, tmp_path / "trial")
        assert result.problem is None, f"{name} {seed}: {result.changed}, {result.command}: {result.problem}"


@pytest.mark.parametrize("name", TARGETS)
def test_a_folder_that_is_left_alone_is_read(home, tmp_path, name):
    """Otherwise a trial would prove nothing."""
    shutil.copytree(home / name, tmp_path / name)
    assert outcome_of(TARGETS[name].commands[0], tmp_path / name, home) == (None, False)


def raises(*_):
    raise KeyError("x")


def takes_memory(*_):
    b"x" * (trial.MAX_BYTES + 2**28)


def takes_time(*_):
    time.sleep(30)


def refuses(*_):
    raise UserError("no")


@pytest.mark.parametrize(
    ("deed", "problem"), [(raises, "KeyError"), (takes_memory, "MB"), (takes_time, "took too long")]
)
def test_a_trial_notices(tmp_path, monkeypatch, deed, problem):
    if deed is takes_time:
        monkeypatch.setattr(trial, "MAX_SECONDS", 1)
    (tmp_path / "it").mkdir()
    assert problem in outcome_of(deed, tmp_path / "it", tmp_path)[0]


def test_an_error_for_the_user_is_none_of_these(tmp_path):
    (tmp_path / "it").mkdir()
    assert outcome_of(refuses, tmp_path / "it", tmp_path) == (None, True)


@pytest.mark.parametrize("place", ["trial/outside/victim", "home/pretrain.jsonl"])
def test_a_file_of_another_folder_is_missed(home, tmp_path, monkeypatch, place):
    path = home / "pretrain.jsonl" if place.startswith("home") else tmp_path / place
    content = path.read_bytes() if path.exists() else b""

    def harms(*_):
        path.write_bytes(b"other")
        return None, False

    monkeypatch.setattr(trial, "outcome_of", harms)
    result = run_trial("pretrain", 0, home, tmp_path / "trial")
    assert "files of another folder were changed" in result.problem
    if place.startswith("home"):
        path.write_bytes(content)
