"""Weights of others: read, checked and renamed."""
