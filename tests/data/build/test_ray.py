"""The Ray engine on a real cluster of two nodes: the bytes of the local engine, whatever dies on the way."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import pytest

pytest.importorskip("ray")

import ray

from minimind_data.build import ray as ray_engine
from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.build.ray import cores_per_task
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from tests.helpers.builds import tree

cluster_test = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which("ps") is None,
        reason="needs 127.0.0.2, a loopback address that Ray does not take for another, and ps",
    ),
]
SPLIT_BYTES = 2**18
TEXTS = [
    f"第{i}个问题：{i} 加 {i} 等于多少？ 等于 {2 * i}。<|im_end|> What is {i} times two? {2 * i}."
    + " filler" * (i % 40)
    for i in range(40_000)
]

# In a process of its own, so that the warnings and threads of Ray's tools are not the tests'; ends when its stdin does, and
# Ray's reaper ends the rest should it be killed.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster

settings = {"node_ip_address": "127.0.0.2", "num_cpus": 1, "object_store_memory": 80 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={**settings, "include_dashboard": False})
node = cluster.add_node(**settings)
print(cluster.address, flush=True)
for line in sys.stdin:
    if line == "kill\\n":
        cluster.remove_node(node, allow_graceful=False)
    else:
        node = cluster.add_node(**settings)
    print("done", flush=True)
cluster.shutdown()
"""


class Cluster:
    """Two nodes of one core each; `ask` is "kill" or "add", and means the second of them."""

    def __init__(self, folder):
        self._process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            env=os.environ | {"RAY_TMPDIR": str(folder), "RAY_DISABLE_IMPORT_WARNING": "1"},
        )
        self.address = self._process.stdout.readline().strip()

    def ask(self, what):
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n"

    def processes(self, name=""):
        """Return the ids of the cluster's processes whose command begins so."""
        found = subprocess.run(
            ["ps", "-o", "pid=,stat=,args=", "-s", str(self._process.pid)],
            capture_output=True,
            text=True,
            check=False,
        )
        lines = [line.split(maxsplit=2) for line in found.stdout.splitlines()]
        return [int(pid) for pid, state, command in lines if state[0] != "Z" and command.startswith(name)]

    def end(self):
        with self._process:
            self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(30)
            self._process.kill()
        try:
            wait_until(lambda: not self.processes(), "a process of the cluster outlived it")
        finally:
            for process in self.processes():
                os.kill(process, signal.SIGKILL)


def wait_until(is_so, otherwise, seconds=60):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)


@pytest.fixture(scope="module")
def cluster():
    with tempfile.TemporaryDirectory(prefix="mm-") as folder:  # short: the names of sockets must fit
        cluster = Cluster(folder)
        try:
            yield cluster
        finally:
            cluster.end()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def right(source, tmp_path_factory):
    """Return the files that the local engine makes; the manifest holds the input's path as it was given."""
    out = tmp_path_factory.mktemp("right") / "out"
    with contextlib.chdir(source.parent):
        tokenize([Path(source.name)], options(out))
    return tree(out)


def options(out, **changes):
    return TokenizeOptions(**{"out": out, "split_bytes": SPLIT_BYTES, **changes})


@contextlib.contextmanager
def command(cluster, source, out, *more):
    """Start `mm-data tokenize` with the slow encoder, in the inputs' folder and with relative paths."""
    arguments = ["tokenize", source.name, "--out", os.path.relpath(out, source.parent), "--engine", "ray"]
    arguments += ["--backend", "tokenizers", "--split-bytes", str(SPLIT_BYTES), *more]
    with subprocess.Popen(
        [sys.executable, "-m", "minimind_cli.data", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=source.parent,
        env=os.environ | {"RAY_ADDRESS": cluster.address},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_work(process, cluster, out, results=1):
    """Wait until some splits are made and both nodes are at work on others."""

    def is_at_work():
        assert process.poll() is None, process.communicate()
        return (
            len(list(out.glob(".mm-build/*.result.json"))) >= results
            and len(cluster.processes("ray::_make")) == 2
        )

    wait_until(is_at_work, "the work did not begin")


class TestOnACluster:
    pytestmark = cluster_test

    def test_the_bytes_are_those_of_the_local_engine(self, cluster, source, right, tmp_path, monkeypatch):
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        monkeypatch.chdir(source.parent)
        said, told = [], []

        @contextlib.contextmanager
        def progress(_, total):
            yield lambda num_bytes, num_tokens: told.append((num_bytes, num_tokens))
            assert sum(num_bytes for num_bytes, _ in told) == total

        on_sigterm = signal.getsignal(signal.SIGTERM)
        summary = tokenize(
            [Path(source.name)],
            options(tmp_path / "out", engine="ray"),
            say=said.append,
            progress=progress,
        )
        assert tree(tmp_path / "out") == right
        assert len(told) == summary.made_shards > 5
        assert sum(num_tokens for _, num_tokens in told) == summary.manifest.num_tokens
        assert "on a Ray cluster with 2 cores on 2 nodes, 1 for each split" in said
        assert signal.getsignal(signal.SIGTERM) == on_sigterm

    def test_a_cluster_that_the_caller_has_joined_is_used_and_not_left(self, cluster, source, tmp_path):
        ray.init(address=cluster.address, log_to_driver=False, logging_level="CRITICAL")
        try:
            tokenize([source], options(tmp_path / "out", engine="ray", split_bytes=2**22))
            assert ray.is_initialized()
        finally:
            ray.shutdown()
        tokenize([source], options(tmp_path / "local", split_bytes=2**22))
        assert tree(tmp_path / "out") == tree(tmp_path / "local")

    def test_a_bad_record_is_the_same_sentence_and_stops_the_rest(
        self, cluster, source, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        bad = tmp_path / "bad.jsonl"
        bad.write_bytes(source.read_bytes()[: 2**20].rsplit(b"\n", 1)[0] + b"\nbad\n" + source.read_bytes())
        with pytest.raises(UserError) as there:
            tokenize([bad], options(tmp_path / "ray", engine="ray"))
        with pytest.raises(UserError, match=r"bad.jsonl:\d+: not JSON") as here:
            tokenize([bad], options(tmp_path / "local"))
        assert str(there.value) == str(here.value)
        assert not cluster.processes("ray::_make")
        assert not list((tmp_path / "ray").rglob("*.partial"))
        with pytest.raises(UserError, match="no dataset"):
            ShardSet.open(tmp_path / "ray")

    def test_a_node_that_dies_is_announced_and_its_splits_are_made(self, cluster, source, right, tmp_path):
        with command(cluster, source, tmp_path / "out") as process:
            wait_for_work(process, cluster, tmp_path / "out")
            cluster.ask("kill")
            said, complaints = process.communicate(timeout=120)
        cluster.ask("add")
        assert process.returncode == 0, complaints
        assert "died (its node was lost); that split is tried again" in complaints
        assert tree(tmp_path / "out") == right
        assert said.startswith(
            os.path.relpath(tmp_path / "out", source.parent) + f": {len(TEXTS):,} documents"
        )
        assert "ray" not in (said + complaints).lower().replace("on a ray cluster with 2 cores", "")

    def test_a_split_whose_worker_dies_each_time_is_given_up(self, cluster, source, tmp_path):
        with command(
            cluster, source, tmp_path / "out", "--workers", "1", "--split-bytes", "64MiB"
        ) as process:
            told = []
            while process.poll() is None:
                for worker in cluster.processes("ray::_make"):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(worker, signal.SIGKILL)
                time.sleep(0.1)
            _, complaints = process.communicate()
        told = [line for line in complaints.splitlines() if "died (its process ended" in line]
        assert process.returncode == 1, complaints
        assert len(told) == 3
        assert told[0].startswith("text.jsonl: the worker on bytes 0 to ")
        assert told[2].startswith("error: ")
        assert "3 times; run the same command again" in told[2]

    def test_ctrl_c_leaves_no_task_and_the_next_run_goes_on(
        self, cluster, source, right, tmp_path, monkeypatch
    ):
        with command(cluster, source, tmp_path / "out") as process:
            wait_for_work(process, cluster, tmp_path / "out")
            process.send_signal(signal.SIGINT)
            _, complaints = process.communicate(timeout=60)
        assert process.returncode == 130, complaints
        assert complaints.splitlines()[-1].startswith("error: interrupted; finished shards are kept")
        assert "Traceback" not in complaints
        assert not cluster.processes("ray::_make")
        assert not list((tmp_path / "out").rglob("*.partial"))
        monkeypatch.chdir(source.parent)
        summary = tokenize([Path(source.name)], options(tmp_path / "out"))
        assert summary.kept_shards
        assert tree(tmp_path / "out") == right

    def test_tasks_end_with_a_driver_that_is_killed(self, cluster, source, right, tmp_path):
        with command(cluster, source, tmp_path / "out") as process:
            wait_for_work(process, cluster, tmp_path / "out")
            process.kill()
        wait_until(lambda: not cluster.processes("ray::_make"), "a task outlived its driver")
        with command(cluster, source, tmp_path / "out") as process:
            said, complaints = process.communicate(timeout=120)
        assert process.returncode == 0, complaints
        assert " from the previous run" in said
        assert tree(tmp_path / "out") == right

    @pytest.mark.parametrize(
        ("spoil", "sentence"),
        [
            ("out", r"out: node 127\.0\.0\.2 \(.+\) does not see this folder as it is; `out` must be on"),
            (
                "input",
                r"text\.jsonl: node 127\.0\.0\.2 \(.+\) does not see this file as it is; inputs must be",
            ),
            (
                "version",
                r"node 127\.0\.0\.2 \(.+\) has tokenizers [\d.]+ there and 0\.0 here; install the same",
            ),
        ],
    )
    def test_a_node_that_differs_is_named(self, cluster, source, tmp_path, monkeypatch, spoil, sentence):
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        if spoil == "out":
            monkeypatch.setattr(ray_engine.secrets, "token_hex", lambda: "never written")
            monkeypatch.setattr(ray_engine, "partial_name", lambda _: tmp_path / "elsewhere" / "token")
            monkeypatch.setattr(Path, "write_text", lambda *_: None)
        elif spoil == "input":
            monkeypatch.setattr(ray_engine, "_stamp", lambda _: (1, 1))
        elif spoil == "module":
            only_here = types.ModuleType("only_here")
            only_here.Thing = type("Thing", (), {"__module__": "only_here"})
            monkeypatch.setitem(sys.modules, "only_here", only_here)
            monkeypatch.setattr(ray_engine, "_versions", lambda: {"thing": only_here.Thing()})
        else:
            real = ray_engine._versions()
            monkeypatch.setattr(ray_engine, "_versions", lambda: {**real, "tokenizers": "0.0"})
        with pytest.raises(UserError, match=sentence):
            tokenize([source], options(tmp_path / "out", engine="ray"))


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("local", "RAY_ADDRESS=local: must be HOST:PORT of a cluster that runs"),
        ("ray://127.0.0.1:1", "RAY_ADDRESS=ray://127.0.0.1:1: must be HOST:PORT"),
        ("127.0.0.2:1", r"no Ray cluster answers at 127\.0\.0\.2:1 \(.*refused\)"),
        ("nonsense", "RAY_ADDRESS=nonsense: no such cluster"),
        ("127.0.0.2:port", r"no Ray cluster answers at 127\.0\.0\.2:port"),
    ],
)
def test_without_a_cluster_nothing_is_started(tmp_path, monkeypatch, address, sentence):
    monkeypatch.setenv("RAY_ADDRESS", address)
    source = tmp_path / "text.jsonl"
    source.write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match=sentence):
        tokenize([source], options(tmp_path / "out", engine="ray"))
    assert not list((tmp_path / "out").glob("**/*.partial"))


def test_ray_is_imported_only_when_asked_for():
    code = (
        "import sys, minimind_cli.data; assert not any(name.split('.')[0] == 'ray' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_ray_the_remedy_is_named(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name == "minimind_data.build.ray"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    source = tmp_path / "text.jsonl"
    source.write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match=r"Ray is not installed; pip install 'minimind-pipeline\[ray\]'"):
        tokenize([source], options(tmp_path / "out", engine="ray"))


@pytest.mark.parametrize(
    ("nodes", "workers", "cores"),
    [
        ([1, 1], 0, 1),
        ([2, 2], 0, 2),
        ([64, 64], 0, 4),
        ([6], 0, 3),  # four would leave two of six idle
        ([64, 64], 6, 3),
        ([64], 1, 1),
        ([8, 8], 8, 4),
        ([], 0, 4),
        ([0, 0], 2, 2),
    ],
)
def test_a_task_reserves_what_leaves_the_fewest_cores_idle(nodes, workers, cores):
    assert cores_per_task(nodes, workers) == cores
