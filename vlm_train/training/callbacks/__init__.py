"""Callbacks: actions at intervals of a training, and when it is stopped."""
