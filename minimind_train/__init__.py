"""Order and learning: which sample comes when, and what a model makes of it."""
