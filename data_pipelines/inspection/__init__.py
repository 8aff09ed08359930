"""Pages that show what a shard set holds."""
