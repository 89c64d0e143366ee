"""What is learned: the next token, or which of two answers is preferred."""
