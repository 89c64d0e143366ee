"""make demo and make demo-chat: from text to a trained model in a few minutes, by the commands of a user."""
