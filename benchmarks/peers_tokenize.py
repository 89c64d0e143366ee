"""`mm-data tokenize` compared with other tools: whole processes, with the same text, tokenizer and cores.

    python benchmarks/peers_tokenize.py TEXT.jsonl [--tokenizer DIR] [--rounds 3] [--repeat 1] [--cores 2]
                                        [--peers tokenizers,datasets,megatron,megatron-fast,datatrove,dolma,litdata,streaming]

Each peer runs in its own environment, made when first needed (see environments.py), through the program peers/run_NAME.py, whose
docstring says how the tool is used; dolma runs through its own command. All use the same cores. A tool that starts a process for
each core gets one thread in each; a tool that is one process gets a thread for each core.

First every tool runs once untimed. That run fills caches and gives its peak memory (processes.py says how it is counted) and its
output, which our own code reads and compares with ours document by document. Then come the timed rounds: ours, peer, ours, next
peer. A ratio is that of two neighbouring runs, so that other work on the machine affects both. Tokens a second count our tokens, with
BOS and EOS, for every tool, since the work is the same. `--repeat N` lengthens the text by different copies (inputs.py). Two things
are prepared before and not timed: the parts for tools that distribute files, and dolma's own input format.

A peer that cannot be installed or fails is named with its reason, and the others continue. Needs Linux.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import outputs
from environments import PEERS, NoEnvironmentError, environment, pinned_version
from inputs import write_copies, write_parts
from machine import describe_machine
from outputs import Comparison, Documents, Frame, compare
from processes import CommandFailedError, Memory, hold_to_cores, timed, watched
from tasks import Task, write_task

from minimind_data.tokenizer.loading import load_tokenizer
from minimind_data.tokenizer.places import SHIPPED

_THREADS = ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Peer:
    """Another project's tool."""

    package: str
    read: Callable[[Path], Documents]
    what: str
    """How it is used, for the table."""
    frame: str = "bos eos"
    """Which tokens it puts round a text."""
    is_many_processes: bool = False


ALL = {
    "tokenizers": Peer("tokenizers", outputs.read_plain, "encode_batch_fast by the thousand, one file"),
    "datasets": Peer(
        "datasets",
        outputs.read_arrow,
        "batched map, a process a core, save_to_disk",
        "",
        is_many_processes=True,
    ),
    "megatron": Peer(
        "megatron-core",
        outputs.read_megatron,
        "preprocess_data.py's method on its IndexedDatasetBuilder, in our words",
        "eos",
        is_many_processes=True,
    ),
    "megatron-fast": Peer(
        "megatron-core",
        outputs.read_megatron,
        "preprocess_data_fast.py's method (gigatoken), in our words",
        "eos",
    ),
    "datatrove": Peer(
        "datatrove",
        outputs.read_datatrove,
        "DocumentTokenizer without shuffle, a worker a core",
        "eos",
        is_many_processes=True,
    ),
    "dolma": Peer(
        "dolma",
        outputs.read_dolma,
        "dolma tokens, a process a core; strips white space, adds no BOS or EOS to a text that has it",
        "bos eos unless there",
        is_many_processes=True,
    ),
    "litdata": Peer(
        "litdata", outputs.read_litdata, "optimize with TokensLoader, a worker a core", is_many_processes=True
    ),
    "streaming": Peer("mosaicml-streaming", outputs.read_mds, "MDSWriter, tokenizers inside"),
}


@dataclass(frozen=True)
class Bench:
    """What all runs share."""

    folder: Path
    task: Task
    ours: tuple[str, ...]

    @property
    def our_out(self) -> Path:
        return self.folder / "ours"

    def reset(self) -> None:
        """Give the next run empty folders."""
        for name in ("ours", "peer", "cache", "tmp"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self.task.out.mkdir()
        (self.folder / "tmp").mkdir()

    def environment(self, threads: int) -> dict[str, str]:
        """Return the environment variables of a run: threads, temporary folders, and no access to a model hub."""
        return {
            **dict.fromkeys(_THREADS, str(threads)),
            "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
            "TMPDIR": str(self.folder / "tmp"),
            "HF_HOME": str(self.folder / "tmp"),
            "HF_HUB_OFFLINE": "1",
            "DATA_OPTIMIZER_CACHE_FOLDER": str(self.folder / "tmp"),
            "DATA_OPTIMIZER_DATA_CACHE_FOLDER": str(self.folder / "tmp"),
        }


def main() -> None:
    arguments = _arguments()
    hold_to_cores(arguments.cores)
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        bench = _prepare(Path(folder), arguments)
        megabytes = bench.task.text.stat().st_size / 1e6
        our_memory = watched(bench.ours, bench.environment(arguments.cores))
        documents = outputs.read_ours(bench.our_out)
        tokens = len(documents.ids)
        frame = Frame(bench.task.bos_id, bench.task.eos_id)
        texts = [frame.take(document) for document in documents.as_bytes()]
        del documents
        ready: dict[str, tuple[Memory, Comparison]] = {}
        failed: dict[str, str] = {}
        for name in arguments.peers:
            try:
                ready[name] = _first_run(bench, name, texts)
            except (NoEnvironmentError, CommandFailedError, ValueError, OSError, AssertionError) as error:
                failed[name] = " ".join(f"{type(error).__name__}: {error}".split())
        del texts
        our_seconds: list[float] = []
        pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in ready}
        for number in range(arguments.rounds):
            for name in list(ready):
                print(f"round {number + 1}: {name}", file=sys.stderr)
                bench.reset()
                our_seconds.append(timed(bench.ours, bench.environment(arguments.cores)))
                bench.reset()
                try:
                    pairs[name].append((our_seconds[-1], timed(*_command(bench, name))))
                except CommandFailedError as error:
                    failed[name] = f"in round {number + 1}: {error}"
                    del ready[name]
        if not our_seconds:  # no peer runs here
            bench.reset()
            our_seconds.append(timed(bench.ours, bench.environment(arguments.cores)))
    print(describe_machine(), end="; ")
    print(
        f"{megabytes:.1f} MB, {tokens / 1e6:.2f} M tokens, {arguments.repeat} "
        f"{'copy' if arguments.repeat == 1 else 'unlike copies'}, median of {arguments.rounds} rounds\n"
    )
    print("| | seconds | M tokens/s | MB/s | peak MB | ours is faster by (each pair) | same tokens |")
    print("|---|---|---|---|---|---|---|")
    work = (tokens / 1e6, megabytes)
    print(f"| **mm-data tokenize** | {_figures(our_seconds, work, our_memory)} | | |")
    for name, (memory, comparison) in ready.items():
        ratios = [theirs / ours for ours, theirs in pairs[name]]
        figures = _figures([theirs for _, theirs in pairs[name]], work, memory)
        ratio = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        print(f"| {_title(name)} | {figures} | {ratio} | {comparison} |")
    for name, why in failed.items():
        print(f"| {_title(name)} | – | – | – | – | – | did not run: {why.replace('|', '/')} |")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=Path)
    parser.add_argument("--tokenizer", type=Path, default=SHIPPED["default"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(ALL))
    arguments = parser.parse_args()
    if unknown := set(arguments.peers) - set(ALL):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    if arguments.rounds < 1 or arguments.repeat < 1 or arguments.cores < 1:
        parser.error("--rounds, --repeat and --cores are at least 1")
    return arguments


def _prepare(folder: Path, arguments: argparse.Namespace) -> Bench:
    """Write the input in every form, and the tokenizer."""
    tokenizer = load_tokenizer(arguments.tokenizer)
    text = folder / "text.jsonl"
    write_copies(arguments.input, text, arguments.repeat)
    write_parts(text, folder / "parts", arguments.cores)
    write_parts(text, folder / "parts-with-ids", arguments.cores, with_ids=True)
    source = arguments.tokenizer if arguments.tokenizer.is_dir() else arguments.tokenizer.parent
    (folder / "tokenizer").mkdir()
    shutil.copyfile(source / "tokenizer_config.json", folder / "tokenizer" / "tokenizer_config.json")
    (folder / "old-tokenizer.json").write_text(_with_old_merges(tokenizer.json))
    task = write_task(
        tokenizer,
        text=text,
        parts=folder / "parts",
        tokenizer_file=folder / "tokenizer" / "tokenizer.json",
        out=folder / "peer",
        cores=arguments.cores,
    )
    ours = [
        str(Path(sys.executable).with_name("mm-data")),
        "tokenize",
        str(text),
        "--out",
        str(folder / "ours"),
    ]
    ours += ["--tokenizer", str(folder / "tokenizer"), "--workers", str(arguments.cores)]
    bench = Bench(folder, task, tuple(ours))
    bench.reset()
    return bench


def _with_old_merges(text: str) -> str:
    """Return the tokenizer.json in a form that `tokenizers` before 0.20 reads: the same merges, each as "a b"."""
    content = json.loads(text)
    merges = content["model"].get("merges", [])
    if not any(" " in part for merge in merges if isinstance(merge, list) for part in merge):
        content["model"]["merges"] = [
            " ".join(merge) if isinstance(merge, list) else merge for merge in merges
        ]
    return json.dumps(content, ensure_ascii=False)


def _command(bench: Bench, name: str) -> tuple[list[str], dict[str, str]]:
    """Return a peer's command and its environment variables."""
    binaries = environment(name)
    if name == "dolma":
        flags = {
            "documents": bench.folder / "parts-with-ids" / "*.jsonl",
            "destination": bench.task.out / "tokens",
            "tokenizer.name_or_path": bench.folder / "old-tokenizer.json",
            "tokenizer.bos_token_id": bench.task.bos_id,
            "tokenizer.eos_token_id": bench.task.eos_id,
            "tokenizer.pad_token_id": bench.task.eos_id,
            "processes": bench.task.cores,
            "dtype": "uint16",
            "work_dir.output": bench.folder / "tmp" / "work",
        }
        command = [str(binaries / "dolma"), "tokens"]
        command += [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    else:
        program = PEERS / f"run_{name.replace('-', '_')}.py"
        command = [str(binaries / "python"), str(program), str(bench.folder / "task.json")]
    threads = 1 if ALL[name].is_many_processes else bench.task.cores
    return command, bench.environment(threads)


def _first_run(bench: Bench, name: str, texts: list[bytes]) -> tuple[Memory, Comparison]:
    """Run a peer for its memory and its tokens."""
    command, variables = _command(bench, name)
    print(f"first run: {name}", file=sys.stderr)
    bench.reset()
    memory = watched(command, variables)
    peer = ALL[name]
    frame = Frame(
        bench.task.bos_id if "bos" in peer.frame else None,
        bench.task.eos_id if "eos" in peer.frame else None,
        unless_there="unless there" in peer.frame,
    )
    return memory, compare(texts, peer.read(bench.task.out).as_bytes(), frame)


def _title(name: str) -> str:
    peer = ALL[name]
    version = f"{peer.package} {pinned_version(name, peer.package)}"
    if name == "megatron-fast":
        version += f", gigatoken {pinned_version(name, 'gigatoken')}"
    return f"{version}: {peer.what}"


def _figures(seconds: list[float], work: tuple[float, float], memory: Memory) -> str:
    """Return the middle cells of a row; `work` is in millions of tokens and in MB."""
    median = statistics.median(seconds)
    return f"{median:.2f} | {work[0] / median:.2f} | {work[1] / median:.1f} | {memory.total_mb:.0f}"


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    main()
