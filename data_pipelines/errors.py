"""Errors of the data half: always with the shard and key (or the raw file and record) they come from."""


class DataError(Exception):
    """Data that cannot be used as it is. The message names where it is and what is wrong with it."""


class BadSample(DataError):
    """One sample is unusable (corrupt image, placeholder mismatch, ...): skipped, counted, quarantined."""
