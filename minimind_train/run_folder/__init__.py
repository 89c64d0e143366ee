"""What a run leaves on disk: its record, its metrics, its checkpoints and its curves."""
