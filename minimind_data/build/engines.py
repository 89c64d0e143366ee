"""Engines, which run the tasks of a build: in this process, in a pool of processes on this machine, or on a Ray cluster (`ray`).

An engine takes the job and the tasks, and yields results as they come, in any order. It knows nothing of shards; `split` makes sure that
the result of a task is the same wherever it runs.
"""

import contextlib
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from typing import Any, Literal

from minimind_data.build.split import HashResult, Job, SplitResult, SplitTask, run_task
from minimind_data.build.workers import CORES_PER_PROCESS, Tries
from minimind_data.errors import UserError
from minimind_data.reporting import CountedReport, Report, Say
from minimind_data.system import num_cores, sigint_blocked


def run_tasks(
    job: Job,
    tasks: list[SplitTask],
    workers: int,
    report: Report,
    say: Say,
    *,
    engine: Literal["local", "ray"],
) -> Iterator[SplitResult | HashResult]:
    """Run tasks on an engine.

    Args:
        job: what all tasks have in common.
        tasks: the splits.
        workers: how many cores may be busy; 0 for all that the engine has.
        report: takes the bytes and tokens that are done.
        say: takes sentences for the user.
        engine: the name of the engine.

    Raises:
        UserError: as `run_local` and `ray.run_ray` say, or Ray is not installed.
    """
    if engine == "local":
        return run_local(job, tasks, workers or num_cores(), report, say)
    try:
        from minimind_data.build.ray import run_ray  # noqa: PLC0415 - Ray is optional, and slow to import
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UserError(
            "`engine` ray: Ray is not installed",
            remedy="pip install 'minimind-pipeline[ray]', or take `engine` local",
            option="engine",
        ) from None
    return run_ray(job, tasks, workers, report, say)


def run_local(
    job: Job, tasks: list[SplitTask], workers: int, report: Report, say: Say
) -> Iterator[SplitResult | HashResult]:
    """Run tasks on this machine with at most `workers` cores busy.

    A process can keep a few cores busy, with several encoding threads beside one that reads and parses, until that one is the limit. For
    more cores there are several such processes. Where one process is enough, it is this one.

    Raises:
        UserError: a task found something that the user must put right, or worker processes died again and again at one split.
    """
    num_processes = _num_processes(workers, len(tasks))
    job = replace(job, encoder_threads=-(-workers // num_processes))
    if num_processes == 1:
        for task in tasks:
            yield run_task(job, task, report)
    else:
        yield from _Pool(job, tasks, num_processes, report, say).run()


def _num_processes(workers: int, num_tasks: int) -> int:
    return max(1, min(-(-workers // CORES_PER_PROCESS), num_tasks))


class _WorkerDiedError(Exception):
    """A worker process ended in the middle of a task; the text says why."""


class _Worker:
    """A process that makes one split after another, and the pipe to it."""

    def __init__(self, job: Job, report: Report) -> None:
        # Spawned and not forked, since the thread pools of encoders do not survive a fork.
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, job), daemon=True)
        # The new process inherits the blocked signal: Ctrl-C reaches both processes, and this one decides.
        with sigint_blocked():
            self.process.start()
        theirs.close()  # so that the pipe is closed when the process ends
        self.task: SplitTask | None = None
        self._report = report
        self._report_of_task = CountedReport(report)

    def give(self, task: SplitTask | None) -> None:
        """Send a task to the process; None lets it end."""
        self.task = task
        self._report_of_task = CountedReport(self._report)
        with contextlib.suppress(BrokenPipeError):  # the next `receive` finds the process dead, and says why
            self.pipe.send(task)

    def receive(self) -> SplitResult | HashResult | None:
        """Take the next message: pass progress on and return None, or return the result of the task.

        Raises:
            UserError: the task found something that the user must put right.
            _WorkerDiedError: the process is dead; what it had reported of this task is taken back.
        """
        try:
            kind, value = self.pipe.recv()
        except (EOFError, OSError):  # between two messages, or in the middle of one
            self.process.join()
            self._report_of_task.take_back()
            raise _WorkerDiedError(_cause_of_death(self.process.exitcode)) from None
        if kind == "user error":
            raise value  # as the worker raised it
        if kind == "crash":
            raise RuntimeError(f"a worker failed:\n{value}")
        if kind == "progress":
            self._report_of_task(*value)
            return None
        assert isinstance(value, SplitResult | HashResult)
        return value


class _Pool:
    """Worker processes and the tasks that wait for them; when a worker dies, its task is tried again."""

    def __init__(
        self,
        job: Job,
        tasks: list[SplitTask],
        num_workers: int,
        report: Report,
        say: Say,
    ) -> None:
        self._job = job
        self._waiting = deque(tasks)
        self._num_workers = num_workers
        self._report = report
        self._tries = Tries(say)
        self._workers: list[_Worker] = []

    def run(self) -> Iterator[SplitResult | HashResult]:
        """Yield results as they come."""
        try:
            for _ in range(self._num_workers):
                self._start()
            while busy := {worker.pipe: worker for worker in self._workers if worker.task is not None}:
                for pipe in connection.wait(list(busy)):
                    worker = busy[pipe]  # type: ignore[index]  # `wait` returns some of the pipes that it got
                    try:
                        result = worker.receive()
                    except _WorkerDiedError as death:
                        self._replace_dead(worker, str(death))
                        continue
                    if result is not None:
                        worker.give(self._waiting.popleft() if self._waiting else None)
                        yield result
        except BaseException:
            for worker in self._workers:
                worker.process.kill()
            raise
        finally:
            for worker in self._workers:
                worker.process.join()

    def _start(self) -> None:
        worker = _Worker(self._job, self._report)
        self._workers.append(worker)
        worker.give(self._waiting.popleft())

    def _replace_dead(self, worker: _Worker, cause: str) -> None:
        """Leave the split of a dead worker to the others, so that fewer share the memory; if it was the last one, start a new one."""
        assert worker.task is not None
        self._workers.remove(worker)
        self._tries.again(worker.task, cause)
        self._waiting.append(worker.task)
        if all(other.task is None for other in self._workers):
            self._start()


def _work(pipe: Connection, job: Job) -> None:
    """Make splits until the message to stop comes, or until the parent is gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    message: tuple[str, Any]
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while task := pipe.recv():
            try:
                result = run_task(job, task, lambda *done: pipe.send(("progress", done)))
                message = ("done", result)
            except (BrokenPipeError, ConnectionResetError):
                raise
            except UserError as error:
                message = ("user error", error)
            except Exception:  # noqa: BLE001 - the parent shows all of it
                message = ("crash", traceback.format_exc())
            pipe.send(message)


def _end_with_parent() -> None:
    """End at once when the parent is killed: the next run may start in this folder, where nothing must be written any more."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _cause_of_death(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        return f"{name}, as when memory runs out" if name == "SIGKILL" else name
    return f"exit status {exit_code}"
