"""What a model learns from the same compute with each layout: pad, concat and pack, with and without the document mask.

    python benchmarks/layouts.py TEXT.jsonl [--tokenizer DIR] [--seq-len 340] [--steps 400] [--seed 42 --seed 43 …] [--threads 2]

Each run trains a small model from the same initial weights, for the same number of steps of the same number of windows, so the same
number of positions goes through the model, text or PAD. Useful tokens are the targets. Their speed is that of the fastest quarter of
the steps (of its slowest step), so that other work on the machine counts little. The loss is the mean over the tokens of held-out
documents. Every model reads each of them alone (in parts, if it is longer than a window).

The mask is tried in concat and pack; in pad a window is one document.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.dataset.format import IGNORED
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.options import options_from
from minimind_data.windows.base import Windows
from minimind_data.windows.opening import open_windows
from minimind_train.model.config import ModelConfig
from minimind_train.model.precision import autocast
from minimind_train.model.transformer import MiniMind
from minimind_train.objectives.losses import summed_cross_entropy
from minimind_train.run import entry
from minimind_train.run.options import PretrainOptions
from minimind_train.run_folder import checkpoint
from minimind_train.run_folder.metrics import FILE_NAME

KINDS = (("pad", False), ("concat", False), ("concat", True), ("pack", False), ("pack", True))
_EVALUATED = 16  # windows at a time


@dataclass(frozen=True, kw_only=True)
class Result:
    windows: int
    useful: float
    """Targets in a window, on average over the run."""
    speed: float
    """Targets a second, in the fastest quarter of the steps."""
    epochs: float
    loss: float


def train(run: Path, dataset: Path, held_out: Path, options: dict[str, object]) -> Result:
    outcome = entry.begin(
        options_from(PretrainOptions, {**options, "run": run, "shards": dataset}), lambda _: None
    )
    steps = [json.loads(line) for line in (run / FILE_NAME).read_text(encoding="utf-8").splitlines()]
    newest = checkpoint.load_latest(run, print)
    assert newest is not None
    config = newest.state.config
    num_windows = outcome.step * config["global_batch"]
    useful = sum(step["targets"] for step in steps) / num_windows
    positions = config["global_batch"] * config["seq_len"]
    seconds = statistics.quantiles((positions / step["tokens_per_second"] for step in steps), n=4)[0]
    chosen = {"layout": config["layout"], "long_documents": config["long_documents"]}
    size = len(open_windows(ShardSet.open(dataset), seq_len=config["seq_len"], **chosen))
    model = MiniMind(options_from(ModelConfig, config)).eval()
    newest.restore(model)
    alone = open_windows(
        ShardSet.open(held_out),
        layout="pack",
        seq_len=config["seq_len"],
        long_documents="fragment",
        documents_apart=True,
    )
    return Result(
        windows=size,
        useful=useful,
        speed=useful * config["global_batch"] / seconds,
        epochs=num_windows / size,
        loss=mean_loss(model, alone, config["dtype"]),
    )


@torch.no_grad()
def mean_loss(model: MiniMind, windows: Windows, dtype: str) -> float:
    total, count = 0.0, 0
    for start in range(0, len(windows), _EVALUATED):
        arrays = windows.fetch(np.arange(start, min(start + _EVALUATED, len(windows))))
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        with autocast(dtype, torch.device("cpu")):
            hidden = model(batch["input_ids"], position_ids=batch["position_ids"])
            total += summed_cross_entropy(hidden, model.head_weight, batch["targets"]).item()
        count += int((batch["targets"] != IGNORED).sum())
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--held-out", type=float, default=0.01, help="the share of documents")
    parser.add_argument("--seq-len", type=int, default=340)
    parser.add_argument("--long-documents", default="cut", help="of pack")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--global-batch", type=int, default=16)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-hidden-layers", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, action="append", help="repeat for several runs of each kind")
    parser.add_argument("--threads", type=int, default=0)
    arguments = vars(parser.parse_args())
    texts, tokenizer, share = (arguments.pop(name) for name in ("texts", "tokenizer", "held_out"))
    seeds = arguments.pop("seed") or [42]
    print(describe_machine(), f"torch {torch.__version__}", sep=", ")
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder) / "data"
        options = {"out": dataset, "tokenizer": tokenizer, "val_fraction": share, "dedup": "exact"}
        tokenize(texts, options_from(TokenizeOptions, options))
        held_out = dataset / "val"
        for name, shards in (("training", ShardSet.open(dataset)), ("held out", ShardSet.open(held_out))):
            lengths = np.concatenate([shard.lengths for shard in shards])
            print(
                f"{name}: {len(lengths):,} documents, {lengths.sum():,} tokens, half of them up to {np.median(lengths):.0f} long"
            )
        fixed = {
            **arguments,
            "micro_batch": arguments["global_batch"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "warmup_steps": arguments["steps"] // 20,
            "log_every": 1,
            "save_every": 0,
            "device": "cpu",
        }
        print(", ".join(f"{name} {value}" for name, value in fixed.items()))
        losses: dict[tuple[str, bool], list[float]] = {kind: [] for kind in KINDS}
        print(
            f"{'layout':8} {'mask':4} {'seed':>5} {'windows':>9} {'useful tokens':>13} {'of window':>9} {'useful/s':>9} "
            f"{'epochs':>7} {'held-out loss':>13} {'minutes':>8}"
        )
        for seed in seeds:
            for number, kind in enumerate(KINDS):
                layout, mask = kind
                begun = time.perf_counter()
                chosen = {**fixed, "layout": layout, "document_mask": mask, "seed": seed}
                result = train(Path(folder) / f"{seed}-{number}", dataset, held_out, chosen)
                losses[kind].append(result.loss)
                print(
                    f"{layout:8} {'yes' if mask else 'no':4} {seed:5} {result.windows:9,} {result.useful:13.1f} "
                    f"{result.useful / arguments['seq_len']:9.1%} {result.speed:9,.0f} {result.epochs:7.2f} {result.loss:13.4f} "
                    f"{(time.perf_counter() - begun) / 60:8.1f}",
                    flush=True,
                )
        if len(seeds) > 1:
            for (layout, mask), values in losses.items():
                error = statistics.stdev(values) / math.sqrt(len(values))
                print(
                    f"{layout:8} {'yes' if mask else 'no':4} mean held-out loss {statistics.mean(values):.4f} ± {error:.4f}"
                )


if __name__ == "__main__":
    main()
