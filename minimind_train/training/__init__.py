"""The loop, its step, and what happens between steps: measuring, tracking, bad steps."""
