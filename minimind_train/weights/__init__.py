"""Weights in and out: of runs, of Hugging Face, of MiniMind and of peft."""
