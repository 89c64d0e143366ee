"""Datasets on disk: their format, and how they are written, opened as one stream of tokens, verified, merged and shuffled."""
