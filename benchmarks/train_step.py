"""Our training step compared with MiniMind's own: tokens a second, useful tokens a second, model FLOPs utilisation, memory.

    python benchmarks/train_step.py [--minimind DIR] [--data TEXT.jsonl --tokenizer DIR] [--shape 512x8 --shape 768x8] [--moe]
                                    [--compile] [--device cpu] [--dtype fp32] [--threads 2] [--rounds 5]

DIR is a checkout of MiniMind. Its model is its own class and its step is its `train_epoch`, both unchanged; ours is `take_step`. Both
begin with the same weights and take the same batches in the same order with MiniMind's settings. They run in turns, step by step, in
one process. Their losses are compared at every step, so that no speed comes from another trajectory. The first round is not timed.
Without --minimind, ours runs alone.

There are two comparisons for each shape:

- step: full windows of random tokens, the same for both, so that only the work differs. Ours runs plain and, with --compile, compiled.
- useful: with --data, texts. MiniMind pads each to a window, ours packs whole texts into as many windows. Only targets count.

FLOPs of a token, forward and backward: 6 for each weight that it is multiplied by (active ones; the output matrix counts, looking up
an embedding does not) and, for attention inside a causal window of L tokens, 6 L x heads x head size for each layer. Utilisation is
that over what the device can do: on a GPU the figure of its data sheet, on the CPU the fastest of some large matrix products in this
run, with the same threads. Seconds are medians over rounds. A ratio is the median over rounds of the ratios of neighbouring steps; `by
processor` uses processor time, on which other work on the machine has less effect. Memory is what two steps need at their peak beyond
what was there before the first, in a process of its own: on a GPU the device's memory, on the CPU all of it.
"""

import argparse
import importlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import types
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from machine import describe_machine

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.dataset.format import IGNORED
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.options import options_from
from minimind_data.windows.opening import open_windows
from minimind_train.batches.steps import StepBatch
from minimind_train.model.compiling import compile_layers
from minimind_train.model.config import ModelConfig
from minimind_train.model.precision import allow_tf32, resolve_dtype
from minimind_train.model.transformer import MiniMind, initialize
from minimind_train.objectives.objective import NextToken
from minimind_train.training import learner
from minimind_train.training.optim import learning_rate, make_optimizer
from minimind_train.training.options import OptimizerOptions
from minimind_train.training.step import take_step

_SHEET_TFLOPS = {
    # Dense products, as the data sheets state them: in bf16 or fp16, in TF32.
    "H200": (989.4, 494.7),
    "H100": (989.4, 494.7),
    "A100": (312.0, 156.0),
    "L40S": (362.1, 183.2),
    "L4": (121.0, 60.0),
    "A10": (125.0, 62.5),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
}
_TOKENIZER_IDS = 6400
_SEED = 42

Batch = list[torch.Tensor]
"""The micro-batches of a step: tokens, int64 [windows, L + 1], 0 where there is none."""


@dataclass(frozen=True, kw_only=True)
class Task:
    config: ModelConfig
    seq_len: int
    micro_batch: int
    accumulation: int
    total_steps: int
    device: str
    dtype: str
    threads: int
    minimind: Path | None

    @property
    def windows(self) -> int:
        return self.micro_batch * self.accumulation

    @property
    def flops(self) -> float:
        """Return the FLOPs of a token; see the module's docstring."""
        config = self.config
        looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        attention = config.num_hidden_layers * self.seq_len * config.num_attention_heads * config.head_size
        return 6 * (config.num_active_parameters - looked_up) + 6 * attention


class Learner(Protocol):
    def step(self, batch: Batch) -> float:
        """Train on a batch, and return its loss."""
        ...


class Ours:
    def __init__(self, task: Task, weights: dict[str, torch.Tensor], *, compiled: bool = False) -> None:
        self.task, self.device, self.number = task, torch.device(task.device), 0
        self.model = MiniMind(task.config)
        self.model.load_state_dict(weights)
        self.model.to(self.device)
        if compiled:
            compile_layers(self.model)
        objective, optim = NextToken(self.model).train(), OptimizerOptions()
        self.learner = learner.Learner(
            objective=objective,
            wrapped=objective,
            optimizer=make_optimizer(self.model, optim),
            optim=optim,
            compute=learner.Compute(device=self.device, dtype=task.dtype),
        )

    def step(self, batch: Batch) -> float:
        samples = []
        for tokens in batch:
            targets = tokens[:, 1:]
            samples.append(
                {"input_ids": tokens[:, :-1].contiguous(), "targets": targets.where(targets != 0, IGNORED)}
            )
        return self.learn(samples)

    def learn(self, samples: list[dict[str, torch.Tensor]]) -> float:
        self.number += 1
        num_targets = sum(int((each["targets"] != IGNORED).sum()) for each in samples)
        micro_batches = [{name: each.to(self.device) for name, each in sample.items()} for sample in samples]
        windows = self.task.windows
        return take_step(
            self.learner,
            StepBatch(
                start=0,
                stop=windows,
                micro_batches=micro_batches,
                num_targets=num_targets,
                num_terms=num_targets,
                num_windows=windows,
            ),
            rate=learning_rate(self.number, self.task.total_steps, self.learner.optim),
        ).loss


class Theirs:
    """MiniMind's classes and its `train_epoch`, whose settings are globals of its module."""

    def __init__(self, task: Task, weights: dict[str, torch.Tensor]) -> None:
        assert task.minimind is not None
        self.task, self.number, self.losses = task, 0, []
        sys.path.insert(0, str(task.minimind))
        model, self.trainer = (
            importlib.import_module(name) for name in ("model.model_minimind", "trainer.train_pretrain")
        )
        warnings.filterwarnings("ignore")
        config = task.config
        own = {
            name: getattr(config, name)
            for name in (
                "vocab_size",
                "num_attention_heads",
                "num_key_value_heads",
                "num_experts",
                "num_experts_per_tok",
            )
        }
        net = model.MiniMindForCausalLM(
            model.MiniMindConfig(config.hidden_size, config.num_hidden_layers, config.use_moe, **own)
        )
        net.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
        net = net.to(task.device).train()
        net.register_forward_hook(lambda _, __, out: self.losses.append(out.loss.detach()))
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(task.dtype)
        own_globals = {
            "args": types.SimpleNamespace(
                device=task.device,
                epochs=1,
                learning_rate=OptimizerOptions().learning_rate,
                accumulation_steps=task.accumulation,
                grad_clip=1.0,
                log_interval=10**9,
                save_interval=10**9,
            ),
            "model": net,
            "lm_config": net.config,
            "optimizer": torch.optim.AdamW(net.parameters(), lr=OptimizerOptions().learning_rate),
            "scaler": torch.amp.GradScaler("cuda", enabled=False),
            "autocast_ctx": torch.autocast(
                torch.device(task.device).type, dtype=half, enabled=half is not None
            ),
        }
        vars(self.trainer).update(own_globals)

    def step(self, batch: Batch) -> float:
        self.losses.clear()
        loader = [(tokens, tokens.where(tokens != 0, IGNORED)) for tokens in batch]
        done, iters = self.number * len(batch), self.task.total_steps * len(batch)
        self.trainer.train_epoch(0, loader, iters, done)
        self.number += 1
        return float(torch.stack(self.losses).mean())


def first_weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    model = MiniMind(config)
    initialize(model, _SEED)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def random_batches(task: Task, count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(_SEED)
    shape = (task.micro_batch, task.seq_len + 1)
    return [
        [
            torch.randint(3, task.config.vocab_size, shape, generator=generator)
            for _ in range(task.accumulation)
        ]
        for _ in range(count)
    ]


@dataclass
class Timed:
    seconds: list[float]
    processor: list[float]
    losses: list[float]
    useful: int = 0


def take_turns(learners: dict[str, Any], batches: dict[str, list[Any]], device: str) -> dict[str, Timed]:
    """Let each take a step in turn, for as many rounds as there are batches; the first is not timed."""
    timings = {name: Timed([], [], []) for name in learners}
    for number in range(len(next(iter(batches.values())))):
        for name, learn in learners.items():
            wall, processor = time.perf_counter(), time.process_time()
            loss = learn(batches[name][number])
            if device != "cpu":
                torch.cuda.synchronize()
            timings[name].losses.append(loss)
            if number:
                timings[name].seconds.append(time.perf_counter() - wall)
                timings[name].processor.append(time.process_time() - processor)
    return timings


def measured_peak(device: str, dtype: str) -> float:
    """Return the FLOPs a second of the fastest of some large matrix products."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    size = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=half) for _ in range(2))
    seconds = []
    for _ in range(6):
        begun = time.perf_counter()
        a @ b
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / min(seconds)


def peak_of(device: str, dtype: str) -> tuple[float, str]:
    if device != "cpu":
        name = torch.cuda.get_device_name(device)
        for key, (half, tf32) in _SHEET_TFLOPS.items():
            if key in name:
                return (half if dtype in {"bf16", "fp16"} else tf32) * 1e12, f"data sheet of {name}"
    return measured_peak(device, dtype), "measured"


def resident(which: str) -> int:
    """Return the bytes that this process has, or had at most. (The figure of getrusage is inherited from its parent.)"""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(which))


def memory_of(task: Task, kind: str) -> int:
    """Return the bytes that two steps need beyond what was there before, in a process of its own."""
    torch.set_num_threads(task.threads)
    if task.device != "cpu":
        allow_tf32(torch.device(task.device), allowed=True)
    learner = make_learner(task, kind, first_weights(task.config))
    batches = random_batches(task, 2)
    if task.device == "cpu":
        before = resident("VmRSS")
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for batch in batches:
        learner.step(batch)
    if task.device == "cpu":
        return resident("VmHWM") - before
    return torch.cuda.max_memory_allocated() - before


def make_learner(task: Task, kind: str, weights: dict[str, torch.Tensor]) -> Learner:
    if kind == "MiniMind":
        return Theirs(task, weights)
    return Ours(task, weights, compiled=kind == "ours, compiled")


def compare_steps(task: Task, kinds: list[str], rounds: int) -> None:
    weights = first_weights(task.config)
    learners = {kind: make_learner(task, kind, weights).step for kind in kinds}
    before, source = peak_of(task.device, task.dtype)
    batches = random_batches(task, rounds + 1)
    timings = take_turns(learners, dict.fromkeys(kinds, batches), task.device)
    peak = max(before, peak_of(task.device, task.dtype)[0])
    print(
        f"step: {task.accumulation} x {task.micro_batch} windows of {task.seq_len} tokens, {task.flops / 1e6:,.0f} MFLOPs a token, "
        f"peak {peak / 1e9:,.0f} GFLOPS ({source})"
    )
    tokens = task.windows * task.seq_len
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for kind in kinds:
            seconds = statistics.median(timings[kind].seconds)
            line = f"  {kind:15} {seconds:8.3f} s  {tokens / seconds:9,.0f} tokens/s  {task.flops * tokens / seconds / peak:6.1%} utilised"
            line += f"  {pool.submit(memory_of, task, kind).result() / 2**20:7,.0f} MiB"
            if kind != kinds[0]:
                line += ratios(timings[kinds[0]], timings[kind])
                gaps = np.abs(np.array(timings[kind].losses) / np.array(timings[kinds[0]].losses) - 1)
                line += f"  losses apart by {gaps.max():.1e} at most"
            print(line, flush=True)
    print(f"  losses {timings[kinds[0]].losses[0]:.4f} to {timings[kinds[0]].losses[-1]:.4f}")


def ratios(theirs: Timed, ours: Timed) -> str:
    wall, processor = (
        statistics.median(np.array(a) / np.array(b))
        for a, b in ((theirs.seconds, ours.seconds), (theirs.processor, ours.processor))
    )
    return f"  {wall:5.2f} times as fast ({processor:.2f} by processor)"


def compare_useful(task: Task, kinds: list[str], rounds: int, dataset: Path) -> None:
    """Run texts in padded windows through the first learner, and packed whole texts through ours."""
    shards = ShardSet.open(dataset)
    padded = open_windows(shards, layout="pad", seq_len=task.seq_len)
    packed = open_windows(shards, layout="pack", seq_len=task.seq_len, documents_apart=True)
    generator = np.random.default_rng(_SEED)
    weights = first_weights(task.config)
    learners, batches, useful = {}, {}, {}
    for kind in kinds:
        learner = make_learner(task, kind, weights)
        windows = padded if kind == kinds[0] else packed
        chosen = generator.permutation(len(windows))[: (rounds + 1) * task.windows]
        steps = []
        for numbers in np.split(chosen, rounds + 1):
            samples = [
                {name: torch.from_numpy(array) for name, array in windows.fetch(part).items()}
                for part in np.split(numbers, task.accumulation)
            ]
            steps.append(samples)
        useful[kind] = (
            sum(int((each["targets"] != IGNORED).sum()) for samples in steps[1:] for each in samples) / rounds
        )
        if isinstance(learner, Theirs):
            # Its model shifts the labels itself, so it takes a window with its last target.
            steps = [[whole_windows(each) for each in samples] for samples in steps]
            learners[kind] = learner.step
        else:
            learners[kind] = learner.learn
        batches[kind] = steps
    timings = take_turns(learners, batches, task.device)
    print(
        f"useful: {task.accumulation} x {task.micro_batch} windows of {task.seq_len} tokens of {len(padded):,} texts"
    )
    for kind in kinds:
        seconds = statistics.median(timings[kind].seconds)
        line = f"  {kind:15} {seconds:8.3f} s  {useful[kind]:8,.0f} learned  {useful[kind] / seconds:9,.0f} useful tokens/s"
        if kind != kinds[0]:
            more = useful[kind] / useful[kinds[0]]
            wall, processor = (
                more * statistics.median(np.array(a) / np.array(b))
                for a, b in (
                    (timings[kinds[0]].seconds, timings[kind].seconds),
                    (timings[kinds[0]].processor, timings[kind].processor),
                )
            )
            line += f"  {wall:5.2f} times as many ({processor:.2f} by processor)"
        print(line, flush=True)


def whole_windows(sample: dict[str, torch.Tensor]) -> torch.Tensor:
    last = sample["targets"][:, -1:].clamp(min=0)
    return torch.cat((sample["input_ids"], last), 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minimind", type=Path, help="a checkout of MiniMind")
    parser.add_argument("--data", type=Path, help="texts, one JSON object with a `text` a line")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--shape", action="append", help="HIDDENxLAYERS; repeatable")
    parser.add_argument("--moe", action="store_true", help="each shape with four experts, too")
    parser.add_argument("--compile", action="store_true", help="ours compiled, too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seq-len", type=int, default=340)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    dtype = resolve_dtype(arguments.dtype, device)
    allow_tf32(device, allowed=True)
    print(
        f"{describe_machine()}, torch {torch.__version__}, {arguments.device} in {dtype}, {arguments.threads} threads"
    )
    kinds = ["MiniMind"] if arguments.minimind else []
    kinds += ["ours", *(["ours, compiled"] if arguments.compile else [])]
    # In processes whose memory is measured, freed memory goes back to the system at once.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with tempfile.TemporaryDirectory() as folder:
        if arguments.data:
            tokenize(
                [arguments.data],
                options_from(TokenizeOptions, {"out": Path(folder), "tokenizer": arguments.tokenizer}),
            )
        for shape in arguments.shape or ["512x8", "768x8"]:
            hidden, layers = map(int, shape.split("x"))
            for experts in (False, True)[: 1 + arguments.moe]:
                config = ModelConfig(
                    hidden_size=hidden,
                    num_hidden_layers=layers,
                    vocab_size=_TOKENIZER_IDS,
                    use_moe=experts,
                    seq_aux=False,
                )
                task = Task(
                    config=config,
                    seq_len=arguments.seq_len,
                    micro_batch=arguments.micro_batch,
                    accumulation=arguments.accumulation,
                    total_steps=arguments.rounds + 2,
                    device=arguments.device,
                    dtype=dtype,
                    threads=arguments.threads,
                    minimind=arguments.minimind and arguments.minimind.resolve(),
                )
                experts_note = ", four experts" if experts else ""
                print(f"\n{shape}{experts_note}: {config.num_parameters / 1e6:.1f} M weights")
                compare_steps(task, kinds, arguments.rounds)
                if arguments.data:
                    compare_useful(task, kinds, arguments.rounds, Path(folder))


if __name__ == "__main__":
    main()
