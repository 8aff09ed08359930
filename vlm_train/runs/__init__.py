"""Runs: their folders, how they start, and what can be asked of one before it trains."""
