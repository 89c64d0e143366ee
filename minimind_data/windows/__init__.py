"""Samples of fixed length over a dataset: the layouts concat, pad and pack, the packing plan, and reading ahead."""
