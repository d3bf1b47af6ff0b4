"""From a corpus to batches.

`corpus.load_rows` reads, tokenises and packs text once; `loader.Loader` gives the batch of any step.
"""
