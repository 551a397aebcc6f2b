"""From text to Megatron shards, in the order of the work:

sources, remote             which files, and opening them
documents, lines, parquet   the texts in them; `records` counts what cannot be used, `settings` says what is not wanted
tokenizer, train, cutting   the sentencepiece model, and long texts in bounded memory
plan, output                the units of work, fixed before it starts, and whose folder it is
units, workers              one unit at a time, on many processes and hosts
assemble, selection,        from units to shards and manifest
shards, manifest
encode                      the command over all of it
verify, trace               whether shards are whole, where a token comes from
"""
