"""From a corpus to batches.

`sources` reads records, `encode` makes them tokens (`tokenize` running text, `examples` prompts and responses),
`packing` makes rows, and `shards` keeps them; `prepare` does it all. `corpus.load_rows` opens what is prepared and
prepares what is not; `mixture` says which row comes n-th, and `loader.Loader` gives the batch of any step.
"""
