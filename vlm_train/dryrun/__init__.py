"""The dry run: what a configuration would cost, found on the meta device without weights, tokenizer or data."""
