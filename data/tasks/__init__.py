"""Tasks that need a long context, made for any tokenizer and length, and scored token by token (docs/evaluation.md)."""
