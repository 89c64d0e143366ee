"""Our windows and our order inside other loops: Hugging Face's Trainer, and MiniMind's own."""
