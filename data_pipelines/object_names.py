"""Names of objects in texts: which of a vocabulary's objects a caption speaks of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.inputs.files import read_json

WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
"""A word: letters and digits, with apostrophes and hyphens between them."""


class ObjectNames:
    """A vocabulary of objects, and the words that each goes by.

    Letter case and the plural endings -s, -es and -ies make no difference, and the longest name wins: a "hot dog" is no
    dog.

    Args:
        words: object -> its further names, or the path of a JSON file with such an object. The object's own name counts
            too.

    Raises:
        DataError: no objects, a name without a word, or one that two objects have.
    """

    def __init__(self, words: Mapping[str, Sequence[str]] | str) -> None:
        found: Any = read_json(Path(words), "objects") if isinstance(words, str) else words
        if not isinstance(found, Mapping) or not found:
            raise DataError('objects: expected {"object": ["another name", ...], ...} with at least one object')
        self._object_of: dict[tuple[str, ...], str] = {}
        for name, others in found.items():
            if isinstance(others, str) or not isinstance(others, Sequence):
                raise DataError(f"objects: {name}: got {others!r}; expected a list of further names")
            for one in (str(name), *map(str, others)):
                self._add_name(str(name), one)
        self.objects = tuple(map(str, found))
        self._longest = max(map(len, self._object_of))

    def _add_name(self, name: str, words: str) -> None:
        key = tuple(map(_make_singular, split_words(words)))
        if not key:
            raise DataError(f"objects: {name}: the name {words!r} has no word")
        if self._object_of.setdefault(key, name) != name:
            raise DataError(f"objects: {words!r} names both {self._object_of[key]!r} and {name!r}")

    def find_mentions(self, text: str) -> list[str]:
        """The objects that a text names, in order, as often as it names them."""
        return list(self._iterate_mentions([_make_singular(word) for word in split_words(text)]))

    def _iterate_mentions(self, words: list[str]) -> Iterator[str]:
        at = 0
        while at < len(words):
            for length in range(min(self._longest, len(words) - at), 0, -1):
                if (found := self._object_of.get(tuple(words[at : at + length]))) is not None:
                    yield found
                    at += length
                    break
            else:
                at += 1


def split_words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return WORD.findall(text.lower())


def _make_singular(word: str) -> str:
    """A word without a plural ending, the same for both: "bus" and "buses" give "bus"."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ses", "xes", "zes", "ches", "shes")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word
