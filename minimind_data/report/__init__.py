"""What a dataset looks like: its statistics, and one HTML page to browse it in."""
