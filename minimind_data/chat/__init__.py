"""Conversations: what a record must hold, chat templates, special tokens as text, and the ids and loss masks that come out."""
