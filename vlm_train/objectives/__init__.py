"""Objectives: plain callables `(model, batch, gather) -> {name: Loss}`; they know nothing of Lightning."""
