"""Our loader compared with others: speed, first batch, resume and memory, with the page cache cold and warm.

    python benchmarks/peers_load.py [TEXT.jsonl] [--tokenizer DIR] [--megabytes 1024] [--rounds 2] [--folder DIR] [--peers ours,torch,…]

Every loader runs in its own processes, and if necessary in its own environment (see environments.py), through the program
peers/load_NAME.py. The docstring of that program says how the loader is used: in the way that its documentation recommends. All
loaders read the same stream of tokens (load_data.py), written by each tool's own writer, and return the same batches: inputs and
targets, int64 [64, 512].

Before the rounds, each loader writes its data and is checked on a small corpus: what an epoch contains, and whether a resume in its
middle continues exactly. It runs without workers and with two; for both cold and warm speed the better one is used. A round is one
process of each loader, one after the other:

- cold: its files are dropped from the page cache (mincore confirms it), it opens them and reads 256 batches;
- warm: its files are read once, it opens them again, and reads for some seconds;
- resume: without workers, it opens a dataset of 10^9 windows in the middle of an epoch and returns one batch. The dataset is sparse,
  or one file under many names. Loaders whose memory or time grows with the number of windows open 10^6 and 10^7 instead.

A factor behind a figure says by how much ours is better: the median over rounds of the ratio within a round. Memory is the peak of all
processes of a loader without pages of files; the first figure is what exceeds its imports. `--folder` keeps the data for the next
time, and chooses the disk. Needs Linux.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import load_data
import numpy as np
from environments import PEERS, NoEnvironmentError, environment
from load_table import ALL, SEQ_LEN, Result, power, table
from machine import describe_machine
from page_cache import drop_pages, share_in_cache
from processes import CommandFailedError, Memory, hold_to_cores, timed, watched

from minimind_data.tokenizer.loading import load_tokenizer
from minimind_data.tokenizer.places import SHIPPED

sys.path.insert(0, str(PEERS))
from load_task import LoadTask

_BATCH = 64
_SMALL_WINDOWS = 2560
_TEXTS = 20_000
_COLD_BATCHES = 256
_WARM_SECONDS = 1.5
_CORES = 2
_MOST_IN_CACHE = 0.01


class Bench:
    """What all runs share: the corpora, and the files of each loader."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.folder = folder
        self.tokenizer = load_tokenizer(arguments.tokenizer)
        self.tokenizer_file = folder / "tokenizer" / "tokenizer.json"
        num_windows = {"large": arguments.megabytes * 500_000 // SEQ_LEN, "small": _SMALL_WINDOWS}
        described = [str(arguments.input.resolve()), self.tokenizer.info.sha256, num_windows]
        kept = folder / "made-from.json"
        if not kept.exists() or json.loads(kept.read_bytes())["described"] != described:
            self._make(arguments, num_windows)
            kept.write_text(json.dumps({"described": described, "num_windows": self.num_windows}))
        self.num_windows: dict[str, int] = json.loads(kept.read_bytes())["num_windows"]

    def _make(self, arguments: argparse.Namespace, num_windows: dict[str, int]) -> None:
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.tokenizer_file.parent.mkdir()
        self.tokenizer_file.write_text(self.tokenizer.json, encoding="utf-8")
        source = arguments.tokenizer if arguments.tokenizer.is_dir() else arguments.tokenizer.parent
        shutil.copyfile(
            source / "tokenizer_config.json", self.tokenizer_file.with_name("tokenizer_config.json")
        )
        documents = load_data.tokenized(arguments.input, arguments.tokenizer)
        self.num_windows = {
            name: load_data.write_corpus(
                self.folder / "corpus" / name,
                documents,
                self.tokenizer,
                num_windows=count,
                num_texts=min(count, _TEXTS),
                seq_len=SEQ_LEN,
            )
            for name, count in num_windows.items()
        }

    def task(self, name: str, action: str, size: str | int, **changes: object) -> LoadTask:
        """Return a task of a loader: on the corpus `large` or `small`, or on a dataset of this many windows."""
        corpus = self.folder / "corpus" / (size if isinstance(size, str) else "large")
        folder = self.folder / "data" / ALL[name].data / str(size)
        folder.mkdir(parents=True, exist_ok=True)
        info = self.tokenizer.info
        settings = {
            "action": action,
            "stream": corpus / "tokens.bin",
            "lengths": corpus / "lengths.bin",
            "text": corpus / "windows.jsonl",
            "tokenizer": self.tokenizer_file,
            "folder": folder,
            "kept": self.folder,
            "num_windows": self.num_windows[size] if isinstance(size, str) else size,
            "bos_id": info.bos_id,
            "eos_id": info.eos_id,
            "vocab_size": info.vocab_size,
            "batch": _BATCH,
            "seq_len": SEQ_LEN,
        }
        return LoadTask(**{**settings, **changes})

    def command(self, name: str, tasks: list[LoadTask]) -> tuple[list[str], dict[str, str]]:
        """Return a loader's command and its environment variables."""
        (self.folder / "tasks.json").write_text(json.dumps([task.as_dict() for task in tasks]))
        (self.folder / "figures.json").unlink(missing_ok=True)
        peer = ALL[name]
        python = environment(peer.environment) / "python" if peer.environment else Path(sys.executable)
        command = [str(python), str(PEERS / f"load_{name}.py"), str(self.folder / "tasks.json")]
        command += [str(self.folder / "figures.json"), repr(time.monotonic())]
        temporary = self.folder / "tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        variables = {
            "TMPDIR": str(temporary),
            "HF_HOME": str(temporary),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "DATA_OPTIMIZER_CACHE_FOLDER": str(temporary),
            "DATA_OPTIMIZER_DATA_CACHE_FOLDER": str(temporary),
        }
        return command, variables

    def figures(self) -> list[dict[str, float]]:
        """Return the figures of the last command."""
        figures: list[dict[str, float]] = json.loads((self.folder / "figures.json").read_bytes())
        return figures


def prepare(bench: Bench, name: str) -> Result:
    """Write a loader's data, check what it reads, and find the best number of workers."""
    peer, result = ALL[name], Result()
    tasks, written = [], []
    for size in ("large", "small", *peer.sizes):
        task = bench.task(name, "write" if isinstance(size, str) else "grow", size)
        if not _done(task).exists():
            shutil.rmtree(task.folder)
            task.folder.mkdir()
            tasks.append(task)
            written.append(task)
    tasks.append(bench.task(name, "check", "small"))
    tasks += [bench.task(name, "resume", size) for size in peer.sizes[:-1]]
    timed(*bench.command(name, tasks))
    for task in written:
        _done(task).touch()
    for task, figure in zip(tasks, bench.figures(), strict=True):
        if task.action == "resume":
            result.smaller[task.num_windows] = figure["resume"]
        if figure.get("index_seconds") and task.action == "grow":
            result.index += f"; index of {power(task.num_windows)} made in {figure['index_seconds']:.1f} s"
    result.data = _compared(bench, name)
    if peer.sizes:
        resume = bench.task(name, "resume", peer.sizes[-1])
        result.resuming = watched(*bench.command(name, [resume]))
    speeds: dict[int, tuple[float, float]] = {}
    memories: dict[int, Memory] = {}
    for workers in peer.workers:
        memories[workers], (cold, _, warm) = _measured(bench, name, workers, workers)
        speeds[workers] = cold["tokens_per_second"], warm["tokens_per_second"]
        result.imports_mb = cold["imports_mb"]
    result.workers_cold = max(speeds, key=lambda workers: speeds[workers][0])
    result.workers_warm = max(speeds, key=lambda workers: speeds[workers][1])
    result.reading = memories[result.workers_warm]
    return result


def _done(task: LoadTask) -> Path:
    return task.folder.with_name(f"{task.folder.name}.done")


def _compared(bench: Bench, name: str) -> str:
    """Say what the check of a loader has shown."""
    epoch, resumed = (np.load(bench.folder / f"{kept}.npy") for kept in ("epoch", "resumed"))
    corpus, check = bench.folder / "corpus" / "small", ALL[name].check
    if check == "places":
        return load_data.compare_places(epoch, corpus)
    if check == "tokens":
        verdict = load_data.compare_tokens(epoch, corpus, _BATCH)
    elif check == "texts":
        verdict = load_data.compare(epoch, load_data.expected_texts(corpus, SEQ_LEN, bench.tokenizer), _BATCH)
    else:
        verdict = load_data.compare(
            epoch, load_data.expected_windows(corpus, SEQ_LEN, ALL[name].stride), _BATCH
        )
    exact = np.array_equal(epoch[len(epoch) - len(resumed) :], resumed)
    return f"{verdict}; resumes {'exactly' if exact else 'elsewhere'}"


def _measured(
    bench: Bench, name: str, workers_cold: int, workers_warm: int, *, resume: bool = False
) -> tuple[Memory | None, list[dict[str, float]]]:
    """Run a loader cold, then warm; with `resume`, timed and without a watcher, then also in the middle of its longest dataset."""
    tasks = [
        bench.task(name, "read", "large", batches=_COLD_BATCHES, workers=workers_cold),
        bench.task(name, "warm", "large"),
        bench.task(name, "read", "large", seconds=_WARM_SECONDS, workers=workers_warm),
    ]
    folder = tasks[0].folder
    drop_pages(folder)
    if (share := share_in_cache(folder)) > _MOST_IN_CACHE:
        raise ValueError(f"{share:.0%} of the files stayed in the page cache")
    if not resume:
        return watched(*bench.command(name, tasks)), bench.figures()
    if ALL[name].sizes:
        tasks.append(bench.task(name, "resume", ALL[name].sizes[-1]))
    timed(*bench.command(name, tasks))
    return None, bench.figures()


def one_round(bench: Bench, name: str, result: Result) -> None:
    """Measure a loader once."""
    _, (cold, _, warm, *resumed) = _measured(
        bench, name, result.workers_cold, result.workers_warm, resume=True
    )
    figures = {
        "warm": warm["tokens_per_second"],
        "cold": cold["tokens_per_second"],
        "first warm": warm["first_batch"],
        "first cold": cold["first_batch"],
        "from start": cold["imports"] + warm["first_batch"],
    }
    result.rounds.append(figures | ({"resume": resumed[0]["resume"]} if resumed else {}))


def main() -> None:
    arguments = _arguments()
    hold_to_cores(_CORES)
    with tempfile.TemporaryDirectory(prefix="peers-") as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(folder, arguments)
        results: dict[str, Result] = {}
        failed: dict[str, str] = {}

        def attempt(name: str, what: str) -> None:
            print(f"{what}: {name}", file=sys.stderr)
            try:
                if what == "preparing":
                    results[name] = prepare(bench, name)
                else:
                    one_round(bench, name, results[name])
            except (NoEnvironmentError, CommandFailedError, ValueError, OSError) as error:
                failed[name] = " ".join(f"{what}: {type(error).__name__}: {error}".split())
                results.pop(name, None)

        for name in arguments.peers:
            attempt(name, "preparing")
        for number in range(arguments.rounds):
            for name in list(results):
                attempt(name, f"round {number + 1}")
        megabytes = bench.num_windows["large"] * SEQ_LEN * 2 / 1e6
    print(describe_machine(), end="; ")
    print(f"{megabytes:,.0f} MB of tokens, median of {arguments.rounds} rounds\n")
    print(table(results, failed))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "input", type=Path, nargs="?", default=Path(__file__).parents[1] / "data" / "sample.jsonl"
    )
    parser.add_argument("--tokenizer", type=Path, default=SHIPPED["default"])
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(ALL))
    arguments = parser.parse_args()
    if unknown := set(arguments.peers) - set(ALL):
        parser.error(f"no such loader: {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    if "ours" not in arguments.peers or arguments.rounds < 1 or arguments.megabytes < 128:
        parser.error("ours is always among --peers, --rounds is at least 1 and --megabytes at least 128")
    return arguments


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    main()
