"""From datasets and an order to the batches of a run, or of anybody's DataLoader."""
