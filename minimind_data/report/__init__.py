"""What a dataset looks like: its statistics, and one HTML page to leaf through it."""
