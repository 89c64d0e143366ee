"""A run from its options to its end: the phases, how a run begins and goes on, its ranks, and the excerpts that its model writes on the way."""
