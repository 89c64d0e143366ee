"""How long a checkpoint stops the training: written before the next step, and written in the background as `mm-train` does.

    python benchmarks/save_pause.py [--preset minimind2] [--device cpu] [--saves 3] [--micro-batch 4] [--seq-len 128] [--out FOLDER]

The steps are real ones, of a model of a published size on random tokens; checkpoints have AdamW's averages. A pause is the time between
two steps in which the training waits for the save. `beside` is the saver of a run (minimind_train/run_folder/saver.py), where the
training waits only for a copy in memory. The script also compares a step while a checkpoint is written with a step while none is,
because writing needs processor time and memory too. The first save of a run is listed separately: its copies need new memory.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as mm-train does, and before torch is imported

import torch
from machine import describe_machine

from minimind_data.options import options_from
from minimind_train.model.config import ModelConfig
from minimind_train.model.presets import PRESETS
from minimind_train.model.transformer import MiniMind, initialize
from minimind_train.objectives.objective import NextToken
from minimind_train.run_folder import checkpoint
from minimind_train.run_folder.checkpoint import CheckpointState
from minimind_train.run_folder.options import SaveOptions
from minimind_train.run_folder.saver import Saver, Snapshot
from minimind_train.run_folder.tensors import tensors_of
from minimind_train.training.optim import make_optimizer
from minimind_train.training.options import OptimizerOptions


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="minimind2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--out", type=Path, help="where to write; by default where temporary files go")
    arguments = parser.parse_args()
    training = Training(arguments)
    training.step()  # the first step makes the optimizer's averages
    tensors = tensors_of(training.model, training.optimizer)
    num_bytes = sum(tensor.nbytes for named in tensors.values() for tensor in named.values())
    print(describe_machine())
    print(f"{arguments.preset} on {arguments.device}, a checkpoint of {num_bytes / 1e6:,.0f} MB\n")
    with tempfile.TemporaryDirectory(prefix="pause-", dir=arguments.out) as folder:
        before = [training.save_before(Path(folder)) for _ in range(arguments.saves)]
        alone = [training.step() for _ in range(5)]
        first, *pauses, beside, writing = training.save_beside(Path(folder), arguments.saves + 1)
    print("| | seconds |\n|---|---|")
    print(f"| pause, written before the next step | {statistics.median(before):.3f} |")
    print(f"| pause, written beside: first save of a run | {first:.3f} |")
    print(f"| pause, written beside: later ones | {statistics.median(pauses):.3f} |")
    print(f"| writing, beside | {writing:.3f} |")
    print(f"| a step while nothing is written | {statistics.median(alone):.3f} |")
    print(f"| a step while a checkpoint is written | {beside:.3f} |")


class Training:
    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.manual_seed(0)
        config = options_from(ModelConfig, {**PRESETS[arguments.preset], "vocab_size": 6400}).resolved()
        self.device = torch.device(arguments.device)
        self.model = MiniMind(config)
        initialize(self.model, 0)
        self.model.to(self.device)
        self.optimizer = make_optimizer(self.model, OptimizerOptions())
        ids = torch.randint(0, 6400, (arguments.micro_batch, arguments.seq_len + 1), device=self.device)
        self.batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}
        self.number = 0

    def step(self) -> float:
        """Take a step and return its seconds."""
        then = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        NextToken(self.model)(self.batch).summed.backward()
        self.optimizer.step()
        self._finish()
        self.number += 1
        return time.perf_counter() - then

    def save_before(self, run: Path) -> float:
        """Save as a loop that waits does; return the seconds."""
        self.step()
        then = time.perf_counter()
        checkpoint.save(run, self._state({"step": self.number}), tensors_of(self.model, self.optimizer))
        pause = time.perf_counter() - then
        shutil.rmtree(run / checkpoint.CHECKPOINTS_NAME)
        return pause

    def save_beside(self, run: Path, saves: int) -> list[float]:
        """Return the pauses of this many saves, then the median step while a checkpoint is written and the median time of writing."""
        saver = Saver(
            run,
            SaveOptions(save_every=1, keep=1),
            Snapshot(tensors=lambda: tensors_of(self.model, self.optimizer), state=self._state),
            say=print,
        )
        pauses, steps, writings = [], [], []
        with saver:
            for _ in range(saves):
                then = time.perf_counter()
                saver.after_step({"step": self.number}, leaving=False)
                pauses.append(time.perf_counter() - then)
                while any(thread.name == "checkpoint" for thread in threading.enumerate()):
                    steps.append(self.step())
                saver.wait()
                writings.append(time.perf_counter() - then)
                self.step()
        return [*pauses, statistics.median(steps), statistics.median(writings)]

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @staticmethod
    def _state(record: dict[str, int]) -> CheckpointState:
        return CheckpointState(step=record["step"], position=0, config={}, dataset="", metrics_lines=0)


if __name__ == "__main__":
    main()
