"""Objectives: plain callables `(model, batch, context) -> {name: Loss}`; they know nothing of Lightning."""
