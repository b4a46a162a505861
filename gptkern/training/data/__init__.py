"""Data of a training: sources, tokenizers, shards of token ids, and the batches that are read from them."""
