"""Rows to token ids and back: sources, tables, prompts, padding, batches, examples, packing, preferences."""
