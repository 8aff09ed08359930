"""Checkpoints: what learns, its optimizer, schedule and position, so written that a half-written one is never used."""

from vlm_train.checkpoint.files import WEIGHTS, verify
from vlm_train.checkpoint.resume import Resume, find_resume, newest_valid
from vlm_train.checkpoint.weights import hand_over, load_run_weights, load_weights, save_weights, weights_file

__all__ = [
    "WEIGHTS", "Resume", "find_resume", "hand_over", "load_run_weights", "load_weights", "newest_valid",
    "save_weights", "verify", "weights_file",
]  # fmt: skip
