"""Where tasks run: in this process, or in a pool of processes on this machine.

An engine is given the job and the tasks and yields results as they come, in any order. It knows nothing of shards; that a
result is right whoever made it is the business of `split.py`.
"""

import contextlib
import itertools
import os
import signal
import traceback
from collections.abc import Iterator
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from typing import Any

from minimind_data.errors import UserError
from minimind_data.split import Job, Report, SplitResult, SplitTask, build_split

_CORES_PER_PROCESS = 4  # above, one Python thread that reads and parses JSON is what costs
_ENCODER_THREADS = ("RAYON_NUM_THREADS", "FASTOKENS_BPE_THREADS")  # read once, at an encoder's first batch
_NO_SPINNING = {"FASTOKENS_SPIN_US": "0"}  # idle encoder threads would take the cores that parse and write


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_local(job: Job, tasks: list[SplitTask], workers: int, report: Report) -> Iterator[SplitResult]:
    """Run tasks on this machine with at most `workers` cores busy.

    A process keeps a few cores busy: its encoder has threads, and reading, parsing and writing hide behind them until Python
    itself becomes the limit. Beyond that there are several such processes. A job that one process can do runs in this one.

    Raises:
        UserError: a task met something that the user must mend, or a worker process died.
    """
    num_processes = min(-(-workers // _CORES_PER_PROCESS), len(tasks))
    with _encoder_threads(-(-workers // num_processes)):
        if num_processes == 1:
            for task in tasks:
                yield build_split(job, task, report)
        else:
            yield from _run_in_processes(job, tasks, num_processes, report)


class _Worker:
    """A process that makes one split after the other, and the pipe to it."""

    def __init__(self, job: Job) -> None:
        # Spawned, not forked: the encoders' thread pools do not survive a fork.
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, job), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe breaks when the process ends
        self.task: SplitTask | None = None

    def give(self, task: SplitTask | None) -> None:
        """Hand over a task; None lets the process end."""
        self.task = task
        with contextlib.suppress(BrokenPipeError):  # its death shows at the next `receive`, with the cause
            self.pipe.send(task)

    def receive(self) -> tuple[str, Any]:
        """Return the next message.

        Raises:
            UserError: the task met something for the user, or the process died.
        """
        assert self.task is not None
        try:
            kind, value = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            split = self.task.split
            raise UserError(
                f"{split.path}: the worker on bytes {split.start:,} to {split.stop:,} died "
                f"({_cause_of_death(self.process.exitcode)}); run the same command again, with fewer --workers if memory was short"
            ) from None
        if kind == "user error":
            raise UserError(value)
        if kind == "crash":
            raise RuntimeError(f"a worker failed:\n{value}")
        return kind, value


def _run_in_processes(
    job: Job, tasks: list[SplitTask], num_workers: int, report: Report
) -> Iterator[SplitResult]:
    waiting = iter(tasks)
    workers: list[_Worker] = []
    try:
        for task in itertools.islice(waiting, num_workers):
            workers.append(_Worker(job))
            workers[-1].give(task)
        busy = {worker.pipe: worker for worker in workers}
        while busy:
            for pipe in connection.wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]  # these are our own pipes again
                kind, value = worker.receive()
                if kind == "progress":
                    report(*value)
                else:
                    worker.give(next(waiting, None))
                    if worker.task is None:
                        del busy[worker.pipe]
                    yield value
    except BaseException:
        for worker in workers:
            worker.process.kill()
        raise
    finally:
        for worker in workers:
            worker.process.join()


def _work(pipe: Connection, job: Job) -> None:
    """Make splits until told to stop. A parent that is gone shows as a broken pipe at the next report, within a block."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    message: tuple[str, Any]
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while task := pipe.recv():
            try:
                result = build_split(job, task, lambda *done: pipe.send(("progress", done)))
                message = ("done", result)
            except (BrokenPipeError, ConnectionResetError):
                raise
            except UserError as error:
                message = ("user error", str(error))
            except Exception:  # noqa: BLE001 - shown whole by the parent
                message = ("crash", traceback.format_exc())
            pipe.send(message)


def _cause_of_death(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        return f"{name}, as when memory runs out" if name == "SIGKILL" else name
    return f"exit status {exit_code}"


@contextlib.contextmanager
def _encoder_threads(count: int) -> Iterator[None]:
    settings = {**dict.fromkeys(_ENCODER_THREADS, str(count)), **_NO_SPINNING}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
