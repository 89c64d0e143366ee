"""A run from its options to its end: the phases, how a run begins and goes on, and its ranks."""
