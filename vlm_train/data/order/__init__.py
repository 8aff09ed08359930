"""Which samples make up a step, in which order and in which rows."""
