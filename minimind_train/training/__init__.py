"""The loop, its step, and what happens between steps: measuring, excerpts, tracking, bad steps."""
