"""The loop alone, over windows that are arithmetic: a run that can be stopped and gone on with in memory."""

from pathlib import Path

import numpy as np
import torch

from minimind_train.batches.steps import BatchDivision, StepLoader
from minimind_train.model.config import ModelConfig
from minimind_train.model.transformer import MiniMind, initialize
from minimind_train.objectives.losses import summed_cross_entropy
from minimind_train.objectives.objective import MicroLoss, NextToken
from minimind_train.order.sample_order import SampleOrder
from minimind_train.order.sample_range import SampleRange
from minimind_train.order.skips import NO_SKIPS
from minimind_train.progress import TrainingProgress
from minimind_train.run_folder.metrics import MetricsLog
from minimind_train.training import loop
from minimind_train.training.learner import Compute, Learner
from minimind_train.training.nonfinite import NonfiniteGuard
from minimind_train.training.optim import make_optimizer
from minimind_train.training.options import OptimizerOptions, TrainingOptions
from tests.helpers.runs import records

SEQ_LEN, VOCAB, NUM_WINDOWS = 6, 30, 40
OPTIM = OptimizerOptions(learning_rate=0.01)
CPU = torch.device("cpu")


class Windows:
    """Window k counts on from k; every fourth one is nothing but padding."""

    layout, seq_len, labels = "concat", SEQ_LEN, False

    def __len__(self):
        return NUM_WINDOWS

    shard_sets = ()

    def will_need(self, windows):
        pass

    def fetch(self, windows):
        tokens = (windows[:, None] + np.arange(SEQ_LEN + 1)) % VOCAB
        targets = np.where(windows[:, None] % 4 == 3, -100, tokens[:, 1:])
        return {"input_ids": tokens[:, :-1].copy(), "targets": targets}


def plain_loss(model, micro_batch):
    return summed_cross_entropy(model(micro_batch["input_ids"]), model.head_weight, micro_batch["targets"])


def step_loader(
    windows, order, *, start, stop, global_batch, micro_batch, rank=0, world_size=1, skips=NO_SKIPS, **options
):
    """The steps of a rank from one position to another."""
    return StepLoader(
        windows,
        SampleRange(order=order, start=start, stop=stop, skips=skips),
        BatchDivision(global_batch=global_batch, micro_batch=micro_batch, rank=rank, world_size=world_size),
        **options,
    )


def learner_of(objective, optim=OPTIM, *, dtype="fp32", scale=None):
    """What learns by an objective, alone on the CPU."""
    return Learner(
        objective=objective,
        wrapped=objective,
        optimizer=make_optimizer(objective.model, optim),
        optim=optim,
        scale=scale,
        compute=Compute(device=CPU, dtype=dtype),
    )


class Plain(NextToken):
    def __init__(self, model, loss):
        super().__init__(model)
        self.loss = loss

    def forward(self, micro_batch):
        return MicroLoss(self.loss(self.model, micro_batch))


class Run:
    """A run that can be stopped and gone on with in memory."""

    def __init__(
        self,
        folder,
        *,
        dropout=0.0,
        loss=plain_loss,
        kind="shuffled",
        total_steps=5,
        global_batch=8,
        **options,
    ):
        config = ModelConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=VOCAB,
            dropout=dropout,
        )
        self.folder = folder
        self.model = MiniMind(config)
        initialize(self.model, 0)
        self.learner = learner_of(Plain(self.model, loss), OPTIM)
        self.optimizer = self.learner.optimizer
        self.order = SampleOrder(num_windows=NUM_WINDOWS, seed=1, kind=kind)
        self.total_steps = total_steps
        self.config = TrainingOptions(
            **{"dtype": "fp32", "global_batch": global_batch, "log_every": 1, **options}
        )
        self.step, self.position = 0, 0
        self.saved, self.said = [], []
        self.guard = NonfiniteGuard(
            self.learner,
            self.config.on_nonfinite,
            run=Path("runs/it"),
            say=self.said.append,
        )

    def save(self, record, *, leaving):
        if leaving:
            self.saved.append((record["step"], record["position"]))

    def go(self, stop_step=None):
        stop_step = stop_step or self.total_steps
        with (
            MetricsLog(self.folder / "metrics.jsonl", last_step=self.step) as metrics,
            step_loader(
                Windows(),
                self.order,
                start=self.position,
                stop=min(stop_step * self.config.global_batch, 3 * NUM_WINDOWS),
                global_batch=self.config.global_batch,
                micro_batch=self.config.micro_batch,
            ) as batches,
        ):
            progress = TrainingProgress(step=self.step, total_steps=self.total_steps, say=self.said.append)
            hooks = loop.Hooks(
                guard=self.guard,
                describe=lambda position: {"epoch": (position - 1) // NUM_WINDOWS},
                metrics=metrics,
                save=self.save,
            )
            outcome = loop.run(self.learner, batches, progress, self.config, hooks)
        self.step, self.position = outcome.step, outcome.position
        return outcome

    @property
    def weights(self):
        return [parameter.detach().clone() for parameter in self.model.parameters()]

    @property
    def metrics(self):
        return records(self.folder / "metrics.jsonl")
