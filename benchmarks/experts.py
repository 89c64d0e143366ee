"""What a mixture of experts costs compared with one MLP over the same tokens: forward and backward, for each implementation.

    python benchmarks/experts.py [--preset minimind-3-moe] [--tokens 2048] [--rounds 7] [--threads 1] [--device cpu|cuda]
                                 [--minimind MODEL_MINIMIND.PY]

The implementations run in turns, so that other work on the machine affects all of them. On the CPU the time is processor time, on
CUDA it is the time of the device, in bf16. The figure is the median of the rounds without the first. With `--minimind`, the class
in MiniMind's own file takes part, on the same weights, and must give the same numbers.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import describe_machine
from torch import Tensor

from minimind_data.options import options_from
from minimind_train.model import moe
from minimind_train.model.config import ModelConfig
from minimind_train.model.moe import MLP, Mixture
from minimind_train.model.presets import PRESETS

Way = Callable[[Tensor], Tensor]


def grouped_or_not(mixture: Mixture, *, grouped: bool) -> Way:
    def run(x: Tensor) -> Tensor:
        former, moe._has_grouped_kernel = moe._has_grouped_kernel, lambda *_: grouped  # noqa: SLF001
        try:
            return mixture(x)[0]
        finally:
            moe._has_grouped_kernel = former  # noqa: SLF001

    return run


def minimind_s(path: Path, mixture: Mixture) -> Way:
    spec = importlib.util.spec_from_file_location("model_minimind", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["model_minimind"] = module
    spec.loader.exec_module(module)
    config = mixture.config.resolved()
    names = (
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "norm_topk_prob",
        "intermediate_size",
    )
    options = {name: getattr(config, name) for name in names}
    theirs = module.MOEFeedForward(module.MiniMindConfig(config.hidden_size, use_moe=True, **options))
    theirs.load_state_dict(mixture.state_dict())
    return theirs.to(next(mixture.parameters()).device)


def seconds(way: Way, x: Tensor, device: torch.device) -> float:
    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            return time.perf_counter()
        return time.process_time()

    began = clock()
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        way(x).sum().backward()
    return clock() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--preset", choices=[name for name in PRESETS if "moe" in name], default="minimind-3-moe"
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minimind", type=Path)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    config = options_from(ModelConfig, PRESETS[arguments.preset])
    mixture = Mixture(config)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.normal_(0, 0.02)
    mixture.to(device)
    active = config.num_experts_per_tok + config.n_shared_experts
    ways: dict[str, Way] = {
        f"one MLP, {active} times as wide": MLP(config.hidden_size, active * config.expert_size).to(device),
        "one expert after the other": grouped_or_not(mixture, grouped=False),
        "grouped multiplication": grouped_or_not(mixture, grouped=True),
    }
    if arguments.minimind:
        ways["MiniMind's class"] = minimind_s(arguments.minimind, mixture)
    x = torch.randn(1, arguments.tokens, config.hidden_size, device=device, requires_grad=True)
    with torch.no_grad():
        answers = [way(x) for name, way in ways.items() if not name.startswith("one MLP")]
        apart = max((answer - answers[0]).abs().max().item() for answer in answers)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds + 1):
        for name, way in ways.items():
            times[name].append(seconds(way, x, device))
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    first = next(iter(medians.values()))
    print(describe_machine())
    print(
        f"{arguments.preset}, {arguments.tokens} tokens; the ways of a mixture are at most {apart:.1e} apart"
    )
    for name, median in medians.items():
        print(f"  {name:28} {median * 1000:8.1f} ms  {median / first:5.2f} times")


if __name__ == "__main__":
    main()
