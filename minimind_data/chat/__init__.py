"""Conversations: their forms, their templates, special tokens that stay text, and which tokens are learned."""
