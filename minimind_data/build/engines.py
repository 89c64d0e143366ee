"""Where tasks run: in this process, in a pool of processes on this machine, or (`ray.py`) on a Ray cluster.

An engine is given the job and the tasks and yields results as they come, in any order. It knows nothing of shards; that a
result is right whoever made it is the business of `split.py`.
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
from minimind_data.reporting import Report, Say
from minimind_data.system import num_cores


def run_tasks(
    job: Job,
    tasks: list[SplitTask],
    workers: int,
    report: Report,
    say: Say,
    *,
    engine: Literal["local", "ray"],
) -> Iterator[SplitResult | HashResult]:
    """Run tasks on the engine of this name, with at most `workers` cores busy, or with all that it has where that is 0.

    Raises:
        UserError: as `run_local` and `ray_engine.run_ray` say, or Ray is not installed.
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

    A process keeps a few cores busy: its encoder has threads, and reading, parsing and writing hide behind them until Python
    itself becomes the limit. Beyond that there are several such processes. A job that one process can do runs in this one.

    Raises:
        UserError: a task met something that the user must mend, or worker processes died again and again at one split.
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
    """A worker process ended in the middle of its task; the text is the cause."""


class _Worker:
    """A process that makes one split after the other, and the pipe to it."""

    def __init__(self, job: Job, report: Report) -> None:
        # Spawned, not forked: the encoders' thread pools do not survive a fork.
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, job), daemon=True)
        with (
            _sigint_blocked()
        ):  # for good in the process that is started: Ctrl-C reaches both, the parent decides
            self.process.start()
        theirs.close()  # so that the pipe breaks when the process ends
        self.task: SplitTask | None = None
        self._report = report
        self._told = (0, 0)

    def give(self, task: SplitTask | None) -> None:
        """Hand over a task; None lets the process end."""
        self.task = task
        self._told = (0, 0)
        with contextlib.suppress(BrokenPipeError):  # its death shows at the next `receive`, with the cause
            self.pipe.send(task)

    def receive(self) -> SplitResult | HashResult | None:
        """Take the next message: pass on progress, or return the result of the task.

        Raises:
            UserError: the task met something for the user.
            _WorkerDiedError: the process is gone; what it had told of this task is taken back.
        """
        try:
            kind, value = self.pipe.recv()
        except (EOFError, OSError):  # between two messages, or in the middle of one
            self.process.join()
            self._report(-self._told[0], -self._told[1])
            raise _WorkerDiedError(_cause_of_death(self.process.exitcode)) from None
        if kind == "user error":
            raise UserError(value)
        if kind == "crash":
            raise RuntimeError(f"a worker failed:\n{value}")
        if kind == "progress":
            self._told = (self._told[0] + value[0], self._told[1] + value[1])
            self._report(*value)
            return None
        assert isinstance(value, SplitResult | HashResult)
        return value


class _Pool:
    """Worker processes, the tasks that wait for them, and the way on when one dies."""

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
                    worker = busy[pipe]  # type: ignore[index]  # these are our own pipes again
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
        """Give a dead worker's split to the others, so that there is one fewer to share the memory; or to a new one at last."""
        assert worker.task is not None
        self._workers.remove(worker)
        self._tries.again(worker.task, cause)
        self._waiting.append(worker.task)
        if all(other.task is None for other in self._workers):
            self._start()


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: Connection, job: Job) -> None:
    """Make splits until told to stop, or until the parent is gone."""
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
                message = ("user error", str(error))
            except Exception:  # noqa: BLE001 - shown whole by the parent
                message = ("crash", traceback.format_exc())
            pipe.send(message)


def _end_with_parent() -> None:
    """End at once when the parent is killed: the next run may begin in this folder, and must find it at rest."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _cause_of_death(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        return f"{name}, as when memory runs out" if name == "SIGKILL" else name
    return f"exit status {exit_code}"
