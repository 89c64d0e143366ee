"""What is on disk: shards, their index, the manifest; writing them, opening them as one stream, checking, merging and shuffling them."""
