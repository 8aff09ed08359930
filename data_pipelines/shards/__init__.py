"""Shard sets on disk: written, indexed, read."""
