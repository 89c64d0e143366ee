"""Progress in bytes: lines where there is no terminal, and reports that are taken back."""

import threading

from minimind_data import reporting
from minimind_data.reporting import ByteProgress, CountedReport, no_progress


class Clock:
    """Time that passes 10 seconds with every look at it."""

    def __init__(self):
        self.seconds = 0.0

    def monotonic(self):
        self.seconds += 10
        return self.seconds


def lines(capsys, monkeypatch, num_bytes, reports):
    monkeypatch.setattr(reporting, "time", Clock())
    with ByteProgress("reading", num_bytes) as report:
        for one in reports:
            report(*one)
    return capsys.readouterr().err.splitlines()


def test_a_line_now_and_then_says_how_far_it_is(capsys, monkeypatch):
    reports = [(10_000_000, 0), (10_000_000, 0), (0, 0), (30_000_000, 2_000_000)]
    assert lines(capsys, monkeypatch, 100_000_000, reports) == [
        "reading: 20% of 100 MB, 1.0 MB/s, 80 s left",
        "reading: 50% of 100 MB, 1.2 MB/s, 2.0M tokens, 40 s left",
    ]


def test_without_a_known_size_there_is_no_share(capsys, monkeypatch):
    assert lines(capsys, monkeypatch, 0, [(1_000_000, 0), (1_000_000, 0)]) == ["reading: 2 MB, 0.1 MB/s"]


def test_threads_lose_nothing(capsys, monkeypatch):
    with ByteProgress("reading", 1) as report:
        threads = [threading.Thread(target=lambda: [report(1, 1000) for _ in range(1000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        monkeypatch.setattr(reporting, "time", Clock())
        monkeypatch.setattr(reporting, "_SECONDS_BETWEEN_LINES", -1e9)
        report(0, 0)
    assert "4.0M tokens" in capsys.readouterr().err


def test_what_is_done_over_is_taken_back():
    with no_progress("reading", 3) as nothing:
        nothing(1, 2)
    sums = [0, 0]

    def add(num_bytes, num_tokens):
        sums[0] += num_bytes
        sums[1] += num_tokens

    report = CountedReport(add)
    report(10, 3)
    report(5, 4)
    assert sums == [report.num_bytes, report.num_tokens] == [15, 7]
    report.take_back()
    assert sums == [0, 0]
    report(2, 1)
    assert sums == [report.num_bytes, report.num_tokens] == [2, 1]
