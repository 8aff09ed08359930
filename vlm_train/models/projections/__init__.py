"""Learned maps between the widths of two models."""
