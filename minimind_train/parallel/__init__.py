"""Devices, ranks, how they are launched and how they end, and tensors that they share out."""
