"""Counting the weights of a model, which its options say in advance."""

from torch import nn


def count_parameters(model: nn.Module) -> int:
    """Return the number of weights, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
