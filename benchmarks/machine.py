"""The machine on which a figure was measured, as each benchmark prints it first."""

import datetime as dt
import os
import platform
from pathlib import Path


def describe_machine() -> str:
    """Return the date, the processor and the number of cores that this process may use."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    day = dt.datetime.now(tz=dt.UTC).date()
    return f"{day}, {model}, {cores} cores, Python {platform.python_version()}"
