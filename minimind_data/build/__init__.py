"""tokenize(): from a plan through engines and splits to a published dataset, interruptible at every moment."""
