"""Training: the transformer, the tokenizer, the judge, and their state on disk."""
