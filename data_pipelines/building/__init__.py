"""Building shard sets in parallel, in parts that can be resumed."""
