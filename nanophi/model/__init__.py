"""Token ids -> logits. Imports text.tokenizer alone, in checkpoint.py."""
