"""JSON lines to shards, the whole command, compared with Hugging Face `tokenizers` in its own parallel batches.

    python benchmarks/tokenize_speed.py INPUT.jsonl [--tokenizer DIR] [--rounds 3] [--repeat 1]

Both run as new processes, in turns, on the same input, cores and tokenizer, and write every document as BOS + ids + EOS in uint16.
The files must be equal byte for byte, or the benchmark fails. `--repeat N` makes the input N times as long first, to show how time and
memory grow.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environments import PEERS
from machine import describe_machine
from tasks import write_task

from minimind_data.system import num_cores
from minimind_data.tokenizer.loading import load_tokenizer


def run(command: list[str]) -> tuple[float, float]:
    """Run a command; return its wall-clock seconds and the peak memory of its largest process in MB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = status
    if status:
        sys.exit(f"{command[0]}: failed")
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, usage.ru_maxrss * unit / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "input.jsonl"
        with source.open("wb") as file:
            for _ in range(arguments.repeat):
                file.write(arguments.input.read_bytes())
        megabytes = source.stat().st_size / 1e6
        out, reference_out = Path(folder) / "out", Path(folder) / "reference"
        reference_out.mkdir()
        write_task(
            load_tokenizer(arguments.tokenizer),
            text=source,
            parts=Path(folder),
            tokenizer_file=Path(folder) / "tokenizer.json",
            out=reference_out,
            cores=num_cores(),
        )
        ours = [str(Path(sys.executable).with_name("mm-data")), "tokenize", str(source), "--out", str(out)]
        ours += ["--tokenizer", str(arguments.tokenizer)] if arguments.tokenizer else []
        theirs = [sys.executable, str(PEERS / "run_tokenizers.py"), str(Path(folder) / "task.json")]
        figures: dict[str, list[tuple[float, float]]] = {"mm-data tokenize": [], "tokenizers": []}
        for _ in range(arguments.rounds):
            shutil.rmtree(out, ignore_errors=True)
            figures["mm-data tokenize"].append(run(ours))
            figures["tokenizers"].append(run(theirs))
        names = [shard["name"] for shard in json.loads((out / "manifest.json").read_bytes())["shards"]]
        if (
            b"".join((out / f"{name}.bin").read_bytes() for name in names)
            != (reference_out / "tokens.bin").read_bytes()
        ):
            sys.exit("the two sides wrote different tokens")
        tokens = (reference_out / "tokens.bin").stat().st_size / 2
    print(describe_machine())
    print(
        f"input {megabytes:.1f} MB, {tokens / 1e6:.2f} M tokens, median of {arguments.rounds}, same bytes on both sides"
    )
    print(f"{'':18} {'seconds':>8} {'MB/s':>7} {'M tok/s':>8} {'peak MB':>8}")
    medians = {}
    for name, rounds in figures.items():
        seconds = medians[name] = statistics.median(seconds for seconds, _ in rounds)
        peak = statistics.median(peak for _, peak in rounds)
        print(
            f"{name:18} {seconds:8.2f} {megabytes / seconds:7.1f} {tokens / 1e6 / seconds:8.2f} {peak:8.0f}"
        )
    pairs = zip(*figures.values(), strict=True)
    ratios = [theirs_seconds / our_seconds for (our_seconds, _), (theirs_seconds, _) in pairs]
    print(
        f"ratio, pair by pair: median {statistics.median(ratios):.1f}, {min(ratios):.1f} to {max(ratios):.1f}"
    )


if __name__ == "__main__":
    main()
