"""What a model writes: sampling, completion and conversation."""
