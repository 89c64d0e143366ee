"""Whatever fails on the disk while a run begins, packs, trains or saves, the same command then ends with the same weights and metrics."""

import errno
import itertools
import shutil

import pytest

from minimind_data.errors import UserError
from minimind_train.run.entry import begin_or_resume
from tests.helpers.faults import Disk, Killed
from tests.helpers.runs import Said, config_of, metrics, weights

OPTIONS = {"steps": 2, "save_every": 1, "keep": 1, "dropout": 0.1, "layout": "pack"}
OLDER = "checkpoints/step-000000001"


def files(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("errors", [(errno.ENOSPC, errno.EIO), (None,)], ids=["errors", "kills"])
def test_a_run_ends_the_same_wherever_the_disk_fails(tmp_path, small_dataset, monkeypatch, errors):
    home = tmp_path / "home"
    data, run = home / "data", home / "run"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))

    def train():
        begin_or_resume(config_of(run, data, **OPTIONS), Said())

    def prepare():
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(small_dataset, data, ignore=shutil.ignore_patterns(".mm-pack"))

    prepare()
    train()
    whole, run_files, data_files = (weights(run, 2), metrics(run)), files(run), files(data)
    for fail_at in itertools.count(1):
        prepare()
        disk = Disk(home, fail_at, errors[fail_at % len(errors)])
        failure = None
        try:
            with disk.mounted():
                train()
        except (OSError, UserError, Killed) as error:
            failure = error
        if isinstance(failure, OSError | UserError):
            assert str(home) in str(failure), fail_at
            assert "\n" not in str(failure), fail_at
        train()
        assert (weights(run, 2), metrics(run)) == whole, fail_at
        # Who finds a run at its end does not look for older checkpoints that should have gone.
        assert {path for path in files(run) if OLDER not in str(path)} == run_files, fail_at
        # A plan of the windows goes elsewhere where the dataset cannot be written to, and an empty lock that stays locks nobody out.
        assert {path for path in files(data) if path.suffix != ".lock"} <= data_files, fail_at
        if disk.operations < fail_at:
            assert failure is None
            break
    assert fail_at > 30
