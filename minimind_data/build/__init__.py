"""Building datasets: tokenize() plans the splits of the inputs, makes a shard of each on an engine, and publishes them as a dataset."""
