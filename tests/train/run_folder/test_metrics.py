"""metrics.jsonl has each step once, whatever was cut off or written twice."""

import resource

import pytest

from minimind_data.errors import UserError
from minimind_train.run_folder.metrics import MetricsLog, NoMetrics, read_metrics
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


@pytest.mark.parametrize(("last_step", "kept"), [(0, 0), (3, 3), (5, 5), (9, 5)])
def test_a_log_knows_how_far_the_run_had_come(path, last_step, kept):
    with MetricsLog(path, last_step=last_step) as log:
        assert (log.num_lines, log.former_last_step) == (kept, 5)
    with MetricsLog(path, last_step=last_step) as log:
        assert (log.num_lines, log.former_last_step) == (kept, kept)


def test_a_new_log_is_empty_and_one_that_does_not_write_has_nothing(tmp_path):
    with MetricsLog(tmp_path / "m", last_step=9) as log:
        assert (log.num_lines, log.former_last_step) == (0, 0)
        log.write({"step": 1})
        assert log.num_lines == 1
    with NoMetrics() as none:
        none.write({"step": 1})
        none.sync()
        assert (none.num_lines, none.former_last_step) == (0, 0)


def test_metrics_are_read_while_a_line_is_being_written(path, tmp_path):
    assert read_metrics(tmp_path / "none") == []
    with path.open("ab") as file:
        file.write(b'[1]\n{"step": "six"}\n{"step": 6}\n{"step": 7}')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    assert read_metrics(path)[1] == {"step": 2, "loss": 0.25}


def test_a_disk_that_is_full_ends_the_run_with_a_sentence(path):
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = path.stat().st_size
    with MetricsLog(path, last_step=5) as log:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, former[1]))
        try:
            with pytest.raises(UserError, match=r"metrics.jsonl: the disk is full; make room"):
                log.write({"step": 6})
            with pytest.raises(UserError, match=r"metrics.jsonl: File too large; mend that"):
                log.write({"step": 6})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, former)
        assert log.num_lines == 5
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5]


NO_METRICS = [
    b"[1]\n", b'{"loss": 1}\n', b'{"step": true}\n', b'{"step": -1}\n', b'{"step": 1.0}\n', b'{"step": "1"}\n', b'{"step": 1e999}\n',
    b'{"step": 1, "position": null}\n', b'{"step": 1, "position": [8]}\n', b"[" * 5000 + b"\n", b"\xff\n", b'{"step": 1' + b"0" * 400 + b"}\n",
]  # fmt: skip


@pytest.mark.parametrize("line", NO_METRICS)
def test_a_line_that_is_no_metrics_is_not_read_and_does_not_stay(path, line):
    whole = path.read_bytes()
    path.write_bytes(line + whole)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5]
    with MetricsLog(path, last_step=5) as log:
        assert (log.num_lines, log.former_last_step) == (5, 5)
    assert path.read_bytes() == whole
