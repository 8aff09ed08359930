"""Checkpoints: what learns, its optimizer, schedule and position, so written that a half-written one is never used."""
