"""What `build.py` gives to components besides their own options: one table, for it and for the checks. No torch import.

A configuration need not name these arguments, and a component takes those that it has.
"""

from __future__ import annotations

from vlm_train.config.schema import MODEL_PARTS

GIVEN: dict[str, frozenset[str]] = {
    "model": frozenset(MODEL_PARTS),  # and those of `parts`
    "parts": frozenset({"in_dim", "out_dim"}),
    "connector": frozenset({"in_dim", "out_dim", "vocab_size"}),
    "llm": frozenset({"vocab_size", "new_tokens"}),  # one of them: does the configuration fix the vocabulary?
    "image": frozenset({"size", "mean", "patch_grid", "patch_size", "frames_per_patch", "processor"}),
    "data": frozenset({"processor", "batch", "seed", "columns"}),
    "peft": frozenset({"model"}),
    "optim": frozenset({"params"}),
    "lr_schedule": frozenset({"optimizer", "total_steps"}),
    "logger": frozenset({"folder"}),
    "strategy": frozenset({"device", "timeout_minutes", "compute_dtype"}),
}
"""Group -> the arguments that its components are given."""
