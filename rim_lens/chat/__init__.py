"""A tokenizer's chat template → token ids with named spans."""
