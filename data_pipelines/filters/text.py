"""Filters on texts: length, language, near duplicates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.filters import Drop, Filter, check_range, check_roles, drop_outside, text_of
from data_pipelines.inputs.files import require_module
from data_pipelines.sample import Sample

SHINGLE = 3  # words


class TextLength(Filter):
    """Drops samples with an annotation in which `roles` say less than `min_chars` or more than `max_chars`."""

    def __init__(
        self,
        *,
        min_chars: int | None = None,
        max_chars: int | None = None,
        roles: Sequence[str] = ("user", "assistant"),
    ) -> None:
        check_range("text_length", min_chars, max_chars)
        self.min_chars, self.max_chars, self.roles = min_chars, max_chars, check_roles(roles)

    def measure(self, sample: Sample, blobs: Sequence[bytes]) -> Drop | None:
        """Every annotation counts alone."""
        for annotation in sample.annotations:
            chars = sum(len(turn.text.strip()) for turn in annotation.turns if turn.role in self.roles)
            if reason := drop_outside("characters", chars, self.min_chars, self.max_chars):
                return reason
        return None


class Language(Filter):
    """Drops samples whose text is not in one of `allowed` (ISO 639-1: en, de, zh ...), as py3langid sees it.

    Text of fewer than `min_chars` characters says too little and is kept. `min_probability` drops what is less certain.
    """

    def __init__(
        self,
        *,
        allowed: Sequence[str],
        min_chars: int = 20,
        min_probability: float = 0.0,
        roles: Sequence[str] = ("user", "assistant"),
    ) -> None:
        known = sorted(_load_identifier().labels)
        if not allowed or set(allowed) - set(known):
            raise DataError(f"language: allowed={list(allowed)}; known: {', '.join(known)}")
        self.allowed, self.min_chars, self.roles = frozenset(allowed), min_chars, check_roles(roles)
        self.min_probability = min_probability

    def measure(self, sample: Sample, blobs: Sequence[bytes]) -> Drop | None:
        """The language of all annotations together."""
        text = text_of(sample, self.roles)
        if len(text) < self.min_chars:
            return None
        language, probability = _load_identifier().classify(text)
        if language not in self.allowed:
            return Drop(f"language {language}")
        return Drop("language uncertain") if probability < self.min_probability else None


class SimilarTexts(Filter):
    """Drops samples whose text is nearly that of an earlier one: near duplicates.

    Two texts are nearly the same when at least `threshold` of their runs of three words are (Jaccard), estimated from
    MinHashes of `permutations` values (datasketch). Samples without text are kept.
    """

    def __init__(
        self, *, threshold: float = 0.8, permutations: int = 128, roles: Sequence[str] = ("user", "assistant")
    ) -> None:
        if not 0 < threshold <= 1 or permutations < 2:
            raise DataError(f"similar_texts: threshold {threshold} (0 to 1), permutations {permutations} (2 or more)")
        self.threshold, self.permutations, self.roles = threshold, permutations, check_roles(roles)
        self._near = require_module("datasketch").MinHashLSH(threshold=threshold, num_perm=permutations)
        self._seen: dict[str, Any] = {}

    def measure(self, sample: Sample, blobs: Sequence[bytes]) -> Any:
        """The MinHash of the text, `None` without any."""
        words = re.findall(r"\w+", text_of(sample, self.roles).lower())
        if not words:
            return None
        runs = {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}
        found = require_module("datasketch").MinHash(num_perm=self.permutations)
        found.update_batch([run.encode() for run in sorted(runs)])
        return require_module("datasketch").LeanMinHash(found)

    def verdict(self, key: str, measured: Any) -> Drop | None:
        """Remembers the texts of kept samples."""
        if measured is None:
            return None
        if any(measured.jaccard(self._seen[other]) >= self.threshold for other in self._near.query(measured)):
            return Drop("text is nearly that of an earlier sample")
        self._near.insert(key, measured)
        self._seen[key] = measured
        return None


@cache
def _load_identifier() -> Any:
    langid = require_module("py3langid.langid")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
