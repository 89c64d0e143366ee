"""How much it saves to leave PAD out: steps of layout pad over whole windows, as MiniMind makes them, and over trimmed ones, as ours.

    python benchmarks/trimming.py INPUT.jsonl [--kind dpo|sft|pretrain] [--tokenizer DIR] [--shape 512x8] [--seq-len 1024]
                                  [--global-batch 8] [--micro-batch 4] [--steps 6] [--threads 2] [--device cpu] [--dtype fp32]

Both begin with the same weights and run in turns, step by step, in one process, over the same samples in the order of a run. The first
step is not timed. Their losses are compared at every step. Seconds are medians over the steps. A ratio is the median of the ratios of
neighbouring steps, by wall-clock time and by processor time, on which other work on the machine has less effect. For pairs, the
log-probabilities of the reference for the first 64 are computed both ways too.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine
from numpy.typing import NDArray

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.dataset.format import IGNORED
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.options import options_from
from minimind_data.windows.base import Windows, WindowSource
from minimind_data.windows.opening import open_windows
from minimind_train.batches.steps import BatchDivision, StepLoader
from minimind_train.batches.trimming import batches_of_like_lengths
from minimind_train.model.config import ModelConfig
from minimind_train.model.precision import autocast
from minimind_train.model.transformer import MiniMind, initialize
from minimind_train.objectives.objective import NextToken, Objective
from minimind_train.objectives.options import PreferenceOptions
from minimind_train.objectives.preference import REFERENCE, Preference, log_probs_of_pairs
from minimind_train.objectives.reference import ReferencedWindows
from minimind_train.order.sample_order import SampleOrder
from minimind_train.order.sample_range import SampleRange
from minimind_train.training import learner
from minimind_train.training.optim import make_optimizer
from minimind_train.training.options import OptimizerOptions
from minimind_train.training.step import StepResult, take_step

_REFERENCED = 64


class Learner:
    def __init__(self, arguments: argparse.Namespace, samples: WindowSource, *, trim: bool) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        objective = make_objective(arguments).to(self.device).train()
        optim = OptimizerOptions()
        self.learner = learner.Learner(
            objective=objective,
            wrapped=objective,
            optimizer=make_optimizer(objective.model, optim),
            optim=optim,
            compute=learner.Compute(device=self.device, dtype=arguments.dtype),
        )
        size, steps = arguments.global_batch, arguments.steps + 1
        loader = StepLoader(
            samples,
            SampleRange(order=SampleOrder(num_windows=len(samples), seed=42), start=0, stop=size * steps),
            BatchDivision(global_batch=size, micro_batch=arguments.micro_batch),
            device=self.device,
            num_terms=objective.num_terms,
            trim=trim,
        )
        self.steps = iter(loader)

    def step(self) -> tuple[StepResult, float, float]:
        """Take a step; return its result, its wall-clock seconds and its processor seconds."""
        batch = next(self.steps)
        start, start_cpu = time.perf_counter(), time.process_time()
        result = take_step(self.learner, batch, rate=1e-5)
        return result, time.perf_counter() - start, time.process_time() - start_cpu


def make_objective(arguments: argparse.Namespace) -> Objective:
    model = MiniMind(arguments.config)
    initialize(model, 42)
    if arguments.kind == "dpo":
        return Preference(model, PreferenceOptions(), lambda micro_batch: micro_batch[REFERENCE])
    return NextToken(model)


def evenly_unsure(windows: Windows, vocab_size: int) -> NDArray[np.float32]:
    """Return the log-probabilities of an untrained model for the answers of pairs, float32 [pairs, 2]."""
    log_probs = np.empty((len(windows), 2), np.float32)
    for number in range(len(windows)):
        samples = windows.fetch(np.array([number]))
        for place, side in enumerate(("chosen", "rejected")):
            log_probs[number, place] = -np.log(vocab_size) * (samples[f"{side}_targets"] != IGNORED).sum()
    return log_probs


def time_reference(arguments: argparse.Namespace, windows: Windows, *, trim: bool) -> float:
    """Return the seconds to compute the log-probabilities of the reference for some pairs."""
    device, size = torch.device(arguments.device), arguments.micro_batch
    model = make_objective(arguments).model.to(device).eval().requires_grad_(False)
    samples = windows.fetch(np.arange(min(_REFERENCED, len(windows))))
    start = time.perf_counter()
    if trim:
        batches = [batch for _, batch in batches_of_like_lengths(samples, size)]
    else:
        firsts = range(0, len(samples["chosen_targets"]), size)
        batches = [{name: array[at : at + size] for name, array in samples.items()} for at in firsts]
    for batch in batches:
        tensors = {name: torch.from_numpy(array).to(device) for name, array in batch.items()}
        with torch.no_grad(), autocast(arguments.dtype, device):
            log_probs_of_pairs(model, tensors)[0].cpu()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=Path)
    parser.add_argument("--kind", choices=("dpo", "sft", "pretrain"), default="dpo")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--shape", default="512x8", help="hidden size x layers")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--global-batch", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="trimming-") as folder:
        options = {"out": Path(folder, "data"), "kind": arguments.kind, "tokenizer": arguments.tokenizer}
        tokenize([arguments.input], options_from(TokenizeOptions, options))
        measure(arguments, ShardSet.open(Path(folder, "data")))


def measure(arguments: argparse.Namespace, shards: ShardSet) -> None:
    hidden, layers = map(int, arguments.shape.split("x"))
    arguments.config = ModelConfig(
        hidden_size=hidden, num_hidden_layers=layers, vocab_size=shards.manifest.tokenizer.vocab_size
    )
    windows = open_windows(shards, layout="pad", seq_len=arguments.seq_len)
    filled = 1 - windows.padding / windows.num_places
    print(describe_machine())
    print(
        f"{len(windows):,} windows of {arguments.kind}, {filled:.0%} filled; {arguments.shape}, {arguments.dtype}, steps of "
        f"{arguments.global_batch} by {arguments.micro_batch}, {arguments.seq_len} tokens\n"
    )
    samples: WindowSource = windows
    if arguments.kind == "dpo":
        samples = ReferencedWindows(windows, evenly_unsure(windows, arguments.config.vocab_size))
    learners = [Learner(arguments, samples, trim=trim) for trim in (False, True)]
    rounds = []
    furthest = 0.0
    for _ in range(arguments.steps + 1):
        rounds.append(results := [learner.step() for learner in learners])
        whole, trimmed = (result for result, *_ in results)
        furthest = max(furthest, abs(trimmed.loss / whole.loss - 1))
    del rounds[0]
    print("| | seconds a step | of the processor | positions a step |\n|---|---|---|---|")
    for place, name in enumerate(("whole windows", "trimmed")):
        took, took_cpu = (statistics.median(each[place][column] for each in rounds) for column in (1, 2))
        positions = statistics.mean(each[place][0].num_tokens for each in rounds)
        print(f"| {name} | {took:.2f} | {took_cpu:.2f} | {positions:,.0f} |")
    faster, cheaper = (
        statistics.median(whole[column] / trimmed[column] for whole, trimmed in rounds) for column in (1, 2)
    )
    print(
        f"\ntrimmed is {faster:.2f} times as fast ({cheaper:.2f} by the processor's time); losses at most {furthest:.1e} apart, relatively"
    )
    if arguments.kind == "dpo":
        whole_took, trimmed_took = (time_reference(arguments, windows, trim=trim) for trim in (False, True))
        print(
            f"the reference of {min(_REFERENCED, len(windows))} pairs: {whole_took:.1f} s whole, {trimmed_took:.1f} s trimmed, "
            f"{whole_took / trimmed_took:.2f} times as fast"
        )


if __name__ == "__main__":
    main()
