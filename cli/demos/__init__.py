"""make demo and make demo-chat: the whole road in a few minutes, by the commands that a user types."""
