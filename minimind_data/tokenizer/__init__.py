"""Text to ids: tokenizer.json, the encoders and how they are checked, the bytes behind tokens, training a vocabulary."""
