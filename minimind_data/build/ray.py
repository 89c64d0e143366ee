"""The engine on a Ray cluster: the same tasks as elsewhere, so the same bytes.

The driver joins a running cluster (RAY_ADDRESS, or the one that this machine is a node of) and never starts one. A split is one Ray task.
Results come back through Ray, but shards do not: the node writes them into the folder of the dataset, which must therefore be on a file
system that all nodes share, and so must the inputs. A token file in the work folder shows whether it is: a task starts only if its node
can read the driver's token there, and stops between two batches when the token is gone. Tasks whose worker or node dies are tried again
here and not by Ray, so that every retry is counted and said.

Imported only for the engine ray; nothing else imports Ray.
"""

import contextlib
import logging
import os
import platform
import re
import secrets
import signal
import socket
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
from ray._private import services
from ray._private import worker as ray_worker
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

from minimind_data.build.split import HashResult, Job, SplitResult, SplitTask, run_task
from minimind_data.build.workers import CORES_PER_PROCESS, ENCODER_ENVIRONMENT, Tries
from minimind_data.errors import UserError
from minimind_data.files import partial_name, remove_partials
from minimind_data.inputs.sources import Source
from minimind_data.reporting import CountedReport, Report, Say

_CONNECT_SECONDS = 10.0
_POLL_SECONDS = 5.0
_STOP_SECONDS = 15.0  # a task ends between two batches, of which one may take seconds
_SAME_EVERYWHERE = ("minimind-pipeline", "tokenizers", "fastokens")
_MISSING_MODULE = re.compile(r"No module named '([\w.]+)'")
_NODE = re.compile(r"\bip=([\w.:]+)")
_CAUSES: dict[type[RayError], str] = {
    NodeDiedError: "its node was lost",
    OutOfMemoryError: "its node ran out of memory",
    WorkerCrashedError: "its process ended, as when memory runs out",
}


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """What all tasks get: the job, and what their nodes must find as the driver does."""

    job: Job
    folder: Path | None
    """The working directory of the driver, where paths are relative to it."""
    token_path: Path
    """The token file, which is in the work folder for as long as this driver waits for results."""
    token: str
    inputs: dict[str, tuple[int, int]]
    """For each input by its location, (size, time of the last change in seconds)."""
    versions: dict[str, str | None]


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What became of a task."""

    result: SplitResult | HashResult | None = None
    user_error: str = ""
    """Why there is no result."""
    num_bytes: int = 0
    num_tokens: int = 0


def run_ray(
    job: Job, tasks: list[SplitTask], workers: int, report: Report, say: Say
) -> Iterator[SplitResult | HashResult]:
    """Run tasks on a Ray cluster, in any order, with at most `workers` of its cores reserved; 0 is all.

    No task goes on after this is left, in whatever way: they are stopped, and those of a driver that was killed are ended by Ray.

    Raises:
        UserError: there is no cluster to join, a node does not see the files or has other versions, a task found something that
            the user must put right, or the worker of one split died again and again.
    """
    with _connected(), _token(job) as (token_path, token):
        num_cores = cores_per_task(_cores_of_nodes(), workers)
        sources = {source for task in tasks for source in task.split.sources}
        shared = _Shared(
            job=replace(job, encoder_threads=num_cores),
            folder=None if job.out.is_absolute() and all(map(Source.is_absolute, sources)) else Path.cwd(),
            token_path=token_path,
            token=token,
            inputs={source.location: _stamp(source) for source in sources},
            versions=_versions(),
        )
        yield from _Run(shared, tasks, report, say, num_cores=num_cores, workers=workers).run()


def cores_per_task(cores_of_nodes: Sequence[int], workers: int) -> int:
    """Return how many cores each task reserves: at most as many as a process keeps busy, and so that the fewest cores stay idle.

    Args:
        cores_of_nodes: of every node of the cluster.
        workers: how many cores may be reserved in all; 0 for any number.
    """
    largest = max(cores_of_nodes, default=0) or CORES_PER_PROCESS
    most = min(CORES_PER_PROCESS, largest, workers or largest)

    def busy(cores: int) -> int:
        num_tasks = sum(cores_of_node // cores for cores_of_node in cores_of_nodes)
        return cores * (min(num_tasks, workers // cores) if workers else num_tasks)

    return max(range(1, most + 1), key=lambda cores: (busy(cores), cores))


class _Run:
    """The tasks that wait and those that Ray has; a task that is lost is tried again."""

    def __init__(
        self,
        shared: _Shared,
        tasks: list[SplitTask],
        report: Report,
        say: Say,
        *,
        num_cores: int,
        workers: int,
    ) -> None:
        self._out = shared.job.out
        self._token_path = shared.token_path
        self._shared = ray.put(shared)
        self._num_cores = num_cores
        self._workers = workers
        self._report = report
        self._say = say
        self._tries = Tries(say)
        self._waiting = deque(tasks)
        self._busy: dict[Any, SplitTask] = {}
        self._has_said_stuck = False
        # Ray does not retry, since it would do so silently; it spreads the tasks over the nodes, so that all of them read files.
        self._remote = ray.remote(_make).options(
            num_cpus=num_cores, max_retries=0, scheduling_strategy="SPREAD"
        )

    def run(self) -> Iterator[SplitResult | HashResult]:
        """Yield results as they come."""
        cores = _cores_of_nodes()
        self._say(
            f"on a Ray cluster with {sum(cores)} cores on {len(cores)} node{'s' * (len(cores) != 1)}, {self._num_cores} for each split"
        )
        try:
            self._submit()
            while self._busy:
                ready, _ = ray.wait(list(self._busy), timeout=_POLL_SECONDS)
                for reference in ready:
                    result = self._take(reference)
                    self._submit()
                    if result is not None:
                        yield result
                if not ready:
                    self._say_if_stuck()
        finally:
            self._stop()

    def _submit(self) -> None:
        """Give Ray as many tasks as it has room for; where we may use all cores, twice as many, so that no node waits for us."""
        room = sum(cores // self._num_cores for cores in _cores_of_nodes())
        limit = self._workers // self._num_cores if self._workers else 2 * room
        while self._waiting and len(self._busy) < max(1, limit):
            task = self._waiting.popleft()
            self._busy[self._remote.remote(self._shared, task)] = task

    def _take(self, reference: Any) -> SplitResult | HashResult | None:
        """Return the result of a task; None where its worker died and it is tried again.

        Raises:
            UserError: the task found something that the user must put right, or its worker died once too often.
        """
        task = self._busy.pop(reference)
        try:
            outcome: _Outcome = ray.get(reference)
        except RayTaskError as error:
            if (module := _MISSING_MODULE.search(str(error))) is not None:  # before the task could check that
                node = _NODE.search(str(error))
                raise UserError(
                    f"node {node[1] if node else 'unknown'} has no Python module {module[1]}",
                    remedy="install minimind-pipeline, the same version, on all nodes of the Ray cluster",
                ) from None
            raise RuntimeError(f"a worker failed:\n{error}") from None
        except RayError as error:
            cause = next(
                (text for kind, text in _CAUSES.items() if isinstance(error, kind)), type(error).__name__
            )
            # A node that Ray has lost may still be writing. Without its temporary file it cannot commit.
            remove_partials(self._out, {f"{task.name}.bin", f"{task.name}.idx"})
            self._tries.again(task, cause)
            self._waiting.append(task)
            return None
        if outcome.result is None:
            raise UserError(outcome.user_error)
        self._report(outcome.num_bytes, outcome.num_tokens)
        return outcome.result

    def _say_if_stuck(self) -> None:
        is_stuck = max(_cores_of_nodes(), default=0) < self._num_cores
        if is_stuck and not self._has_said_stuck:
            self._say(
                f"no node of the Ray cluster has {self._num_cores} cores now; waiting for one (Ctrl-C and the same command again go "
                "on with what is there)"
            )
        self._has_said_stuck = is_stuck

    def _stop(self) -> None:
        """Let the tasks that still run stop between two batches, so that they remove their temporary files.

        Removing the token does this and not `ray.cancel`, with which Ray 2.60 aborts this process if a task ends as it is cancelled. Tasks
        that do not stop in time are ended by Ray when the driver leaves the cluster.
        """
        self._token_path.unlink(missing_ok=True)
        if self._busy:
            ray.wait(list(self._busy), num_returns=len(self._busy), timeout=_STOP_SECONDS)


class _StoppedError(Exception):
    """The token is gone: the driver is gone, or waits for no more results."""


def _make(shared: _Shared, task: SplitTask) -> _Outcome:
    """Make one split, on the node that Ray has chosen."""
    node = f"{ray.util.get_node_ip_address()} ({platform.node()})"  # type: ignore[no-untyped-call]

    def stop_without_token(_num_bytes: int, _num_tokens: int) -> None:
        if not shared.token_path.exists():
            raise _StoppedError

    report = CountedReport(stop_without_token)
    os.environ.update(ENCODER_ENVIRONMENT)
    try:
        _check(shared, task, node)
        result = run_task(shared.job, task, report)
    except _StoppedError:
        return _Outcome(
            user_error=f"{shared.token_path}: was removed while the build was at work; run the same command again"
        )
    except UserError as error:
        return _Outcome(user_error=str(error))
    except OSError as error:
        where = error.filename or shared.job.out
        return _Outcome(user_error=f"{where}: {error.strerror or error}, says node {node}")
    return _Outcome(result=result, num_bytes=report.num_bytes, num_tokens=report.num_tokens)


def _check(shared: _Shared, task: SplitTask, node: str) -> None:
    """Check that this node has the versions of the driver and sees its files.

    Raises:
        UserError: it has others, or does not see them.
    """
    shared_by_all = "must be on a file system that all nodes of the Ray cluster share"
    if different := [
        f"{name} {here or 'missing'} there and {shared.versions[name] or 'missing'} here"
        for name, here in _versions().items()
        if here != shared.versions[name]
    ]:
        raise UserError(f"node {node} has {', '.join(different)}", remedy="install the same on all nodes")
    if shared.folder is not None:
        try:
            os.chdir(shared.folder)
        except OSError:
            raise UserError(
                f"node {node} does not see this folder, which {shared_by_all}; or name all files by their "
                "full paths",
                where=shared.folder,
            ) from None
    try:
        is_same_folder = shared.token_path.read_text() == shared.token
    except OSError:
        is_same_folder = False
    if not is_same_folder:
        raise UserError(
            f"node {node} does not see this folder as it is",
            where=shared.job.out,
            remedy=f"`out` {shared_by_all}",
            option="out",
        )
    for source in task.split.sources:
        try:
            is_same_file = _stamp(source) == shared.inputs[source.location]
        except (OSError, UserError):
            is_same_file = False
        if not is_same_file:
            raise UserError(
                f"node {node} does not see this file as it is; inputs {shared_by_all}", where=source.name
            )


def _stamp(source: Source) -> tuple[int, int]:
    size, changed = source.stamp()
    return size, changed // 10**9


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in _SAME_EVERYWHERE:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _cores_of_nodes() -> list[int]:
    return [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _token(job: Job) -> Iterator[tuple[Path, str]]:
    """Put a token file into the work folder, by which nodes recognize the folder; if we are killed, the next build removes it."""
    path = partial_name(job.work_folder / "ray")
    token = secrets.token_hex()
    path.write_text(token)
    try:
        yield path, token
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """Join the cluster, and leave it at the end; where the caller has joined one already, use that."""
    if ray.is_initialized():
        yield
        return
    address = _cluster_address()
    is_main_thread = threading.current_thread() is threading.main_thread()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    # Ray prints pages on our stdout about what happens to its processes; we say what matters to the user.
    speaks = ray_worker._worker_logs_enabled  # noqa: SLF001 - there is no public switch
    ray_worker._worker_logs_enabled = False  # noqa: SLF001
    try:
        try:
            with warnings.catch_warnings():
                # Ray 2.50 warns of a change for GPUs.
                warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray\.")
                ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
        except (RayError, ConnectionError, OSError, RuntimeError, ValueError) as error:
            message = str(error).strip() or type(error).__name__
            raise UserError(
                f"the Ray cluster at {address} cannot be joined ({message.splitlines()[0]})",
                remedy="run this on a node of it, with the same versions of Ray and Python",
            ) from None
        finally:
            if is_main_thread:  # Ray takes it over, and would turn it into an exit status of its own
                signal.signal(signal.SIGTERM, on_sigterm)
        yield
    finally:
        ray.shutdown()
        ray_worker._worker_logs_enabled = speaks  # noqa: SLF001


def _cluster_address() -> str:
    """Return HOST:PORT of a cluster that answers; without one, `ray.init` would try for a quarter of an hour, or start one here.

    Raises:
        UserError: there is no such cluster.
    """
    setting = os.environ.get("RAY_ADDRESS", "")
    if setting == "local" or "://" in setting:
        raise UserError(
            f"RAY_ADDRESS={setting}: must be HOST:PORT of a cluster that runs and that this machine is a node of; or unset it"
        )
    try:
        address = services.canonicalize_bootstrap_address_or_die("auto")
    except (ConnectionError, ValueError, OSError):
        what = f"RAY_ADDRESS={setting}: no such cluster" if setting else "no Ray cluster runs on this machine"
        raise UserError(
            what,
            remedy="begin one with `ray start --head`, or set RAY_ADDRESS to HOST:PORT of one that this "
            "machine is a node of",
        ) from None
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({error})",
            remedy="begin it, or set RAY_ADDRESS to HOST:PORT of one that runs",
        ) from None
    return address
