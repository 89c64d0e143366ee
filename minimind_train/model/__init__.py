"""MiniMind's transformer: its sizes, its experts, adapters, attention inside documents, precision and compiling."""
