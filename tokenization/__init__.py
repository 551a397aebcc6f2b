"""From text to Megatron shards: sources, tokenizer, encoding, manifest, verification."""
