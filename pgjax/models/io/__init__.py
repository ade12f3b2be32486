"""Models in files: sources, config, tensors, GGUF, tokenizer; load, save, and reward models as classifiers."""
