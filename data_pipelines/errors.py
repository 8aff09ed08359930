"""Errors of the data half: always with the shard and key (or the raw file and record) they come from."""

from __future__ import annotations

import re

VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|\S*/\S+|(?<!\bmp)\d+(?:\.\d+)?")
NAMES = re.compile(r"^(?:\S*… )?(?:\w+ \S*…\S*: )+")


EMPTY = "empty"
"""The kind of a record that holds nothing to learn: left out and counted, but no reason to stop a build."""


class DataError(Exception):
    """Data that cannot be used as it is. The message names where it is and what is wrong with it."""


class BadSample(DataError):
    """One sample is unusable (corrupt image, placeholder mismatch, ...): skipped, counted, quarantined.

    `kind` is the word it is counted under: corrupt (the bytes are not those that were indexed), malformed (they are no
    sample), image (a picture that cannot be used), too_long, empty ...; `shard` and `key` say where it is, once known.
    """

    def __init__(self, message: str, *, kind: str = "other", shard: str = "", key: str = "") -> None:
        super().__init__(message)
        self.kind, self.shard, self.key = kind, shard, key


def common_reason(message: str) -> str:
    """What `message` has in common with others like it: no names of records, quoted values, paths or numbers."""
    return NAMES.sub("", VARYING.sub("…", message))[:120]
