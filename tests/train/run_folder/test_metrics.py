"""metrics.jsonl has each step once, whatever was cut off or written twice."""

import pytest

from minimind_train.run_folder.metrics import MetricsLog
from tests.helpers.runs import records


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, last_step=0) as log:
        for step in range(1, 6):
            log.write({"step": step, "loss": step / 8})
    return path


def steps(path):
    return [record["step"] for record in records(path)]


def test_what_is_written_can_be_read_at_once(tmp_path):
    with MetricsLog(tmp_path / "m", last_step=0) as log:
        log.write({"step": 1, "loss": 0.1, "shard": "中"})
        assert records(tmp_path / "m") == [{"step": 1, "loss": 0.1, "shard": "中"}]
        log.sync()


@pytest.mark.parametrize("last_step", range(7))
def test_a_resumed_log_has_every_step_once(path, last_step):
    with MetricsLog(path, last_step=last_step) as log:
        for step in range(last_step + 1, 8):
            log.write({"step": step, "loss": 0.0})
    first = range(1, min(last_step, 5) + 1)
    assert steps(path) == [*first, *range(last_step + 1, 8)]


@pytest.mark.parametrize(
    "torn", [b'{"step": 3', b'{"step": 3, "loss": 0.375}', b"\x00\x00", b"\xff\n", b"[]\n"]
)
def test_a_torn_last_line_is_passed_over_and_cut_off(path, torn):
    path.write_bytes(path.read_bytes() + torn)
    with MetricsLog(path, last_step=5) as log:
        log.write({"step": 6})
    assert steps(path) == [1, 2, 3, 4, 5, 6]


def test_nothing_is_rewritten_where_nothing_is_cut(path):
    before = path.stat()
    MetricsLog(path, last_step=5).__exit__(None, None, None)
    after = path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_what_is_no_line_of_metrics_goes_and_is_not_counted(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"{}\n", b"\xff\n", *lines[2:], b"[]\n", b'{"step": 9']))
    with MetricsLog(path, last_step=5) as log:
        assert log.num_lines == 4
        log.write({"step": 6})
        assert log.num_lines == 5
    assert steps(path) == [1, 3, 4, 5, 6]


def test_only_numbers_that_json_knows(tmp_path):
    with (
        MetricsLog(tmp_path / "m", last_step=0) as log,
        pytest.raises(ValueError, match="not JSON compliant"),
    ):
        log.write({"step": 1, "loss": float("nan")})
