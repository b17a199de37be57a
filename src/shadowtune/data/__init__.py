"""Data: rows to examples, to token ids, to batches; prompts and answers of generation."""
