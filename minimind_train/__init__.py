"""Training: the order of samples, the model, and a run from its first step to its last. Imports minimind_data, which never imports this."""
