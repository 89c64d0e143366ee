"""A model of a few weights with its optimizer, to be saved, restored and compared bit for bit."""

import torch

from minimind_train.model.config import ModelConfig
from minimind_train.model.transformer import MiniMind, initialize
from minimind_train.run_folder.checkpoint import CheckpointState
from minimind_train.training.optim import make_optimizer
from minimind_train.training.options import OptimizerOptions

CONFIG = ModelConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=40
)


def make(seed=0, config=CONFIG):
    model = MiniMind(config)
    initialize(model, seed)
    return model, make_optimizer(model, OptimizerOptions(learning_rate=0.01))


def train(model, optimizer, steps):
    for step in steps:
        ids = torch.arange(12).reshape(2, 6) * (step + 1) % 40
        optimizer.zero_grad()
        model.logits(model(ids)).logsumexp(-1).sum().backward()
        optimizer.step()


def state(step):
    return CheckpointState(
        step=step, position=step * 8, config={"seed": 1, "lr": 5e-4}, dataset="abc", metrics_lines=step
    )


def bits(model, optimizer):
    tensors = dict(model.named_parameters())
    for name, parameter in model.named_parameters():
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}
