"""From a corpus to batches.

`sources` and `source_files` read raw records from `files` and datasets. `records` tokenizes running text, and `prompts`
prompts with responses, by a `chat_template` where they are conversations. `rows` packs tokens into rows, and `shards`
stores rows; `prepare` runs all of this in parallel and writes a `manifest`. `corpus.load_rows` opens prepared rows and
prepares raw text first; `loader` mixes sources of rows and gives the batch of any step.
"""
