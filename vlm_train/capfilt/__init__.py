"""CapFilt (BLIP, arXiv 2201.12086, section 3.3): a trained run captions and scores a shard set, beside it."""
