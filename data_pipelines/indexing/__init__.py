"""Indexing shards that others wrote: their addresses, and one small index a shard."""
