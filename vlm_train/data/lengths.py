"""The length index: how many tokens and views every sample takes, known before any image is read.

A length depends on the shards, the template, the tokenizer, the media layout and the options of rendering, so it is
measured once for each such combination and kept in a small file (8 bytes a sample). What is measured is what training
renders: a row that was planned fits.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import BadSample

VERSION = 1
CHUNK = 512  # samples that a process measures at a time
FEW = 2000  # samples that are not worth starting processes for
PROGRESS_SECONDS = 10.0

Measure = Callable[[int], tuple[int, int]]


@dataclass(frozen=True)
class Lengths:
    """Tokens and views of every sample `[N]`; 0 tokens: it cannot be used, and stays a hole in the order."""

    tokens: NDArray[np.int32]
    views: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.tokens)


def cached_lengths(name: str, count: int, key: str, measure: Measure, cache: Path, workers: int) -> Lengths:
    """The lengths of `count` samples, from the cache or measured now. Processes that ask together measure once.

    Args:
        name: what the progress calls these samples.
        key: fingerprint of everything that a length depends on.
        measure: number of a sample -> tokens and views. Raises `BadSample` where there are none.
    """
    path = cache / f"{key[:24]}.npz"
    if (found := _read(path, count)) is not None:
        return found
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        if (found := _read(path, count)) is None:
            found = _measure_all(name, count, measure, workers)
            partial_path = path.with_suffix(f".{os.getpid()}.partial.npz")
            np.savez(partial_path, tokens=found.tokens, views=found.views)
            partial_path.rename(path)
    return found


def fingerprint(*things: Any) -> str:
    """Hash of plain data, dataclasses, functions (by name) and objects (by their attributes)."""
    return hashlib.sha256(json.dumps([VERSION, *map(_describe, things)], sort_keys=True).encode()).hexdigest()


def _describe(thing: Any) -> Any:
    if thing is None or isinstance(thing, (bool, int, float, str)):
        return thing
    if isinstance(thing, dict):
        return {str(key): _describe(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [_describe(value) for value in thing]
    if isinstance(thing, partial):
        return [_describe(thing.func), _describe(thing.args), _describe(thing.keywords)]
    if hasattr(thing, "backend_tokenizer"):
        return hashlib.sha256(thing.backend_tokenizer.to_str().encode()).hexdigest()
    if hasattr(thing, "__qualname__"):
        bound = getattr(thing, "__self__", None)
        return [thing.__module__, thing.__qualname__, _describe(bound) if bound is not None else None]
    values = {f.name: getattr(thing, f.name) for f in fields(thing)} if is_dataclass(thing) else vars(thing)
    return [type(thing).__module__, type(thing).__qualname__, _describe(values)]


def _read(path: Path, count: int) -> Lengths | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            lengths = Lengths(file["tokens"], file["views"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None  # not there, or cut short: measured again
    return lengths if lengths.tokens.shape == lengths.views.shape == (count,) else None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _measure_all(name: str, count: int, measure: Measure, workers: int) -> Lengths:
    tokens, views = np.zeros(count, np.int32), np.zeros(count, np.int32)
    chunks = [range(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]
    said = time.monotonic()
    for chunk, rows in zip(chunks, _results(measure, chunks, count, workers)):
        tokens[chunk.start : chunk.stop], views[chunk.start : chunk.stop] = rows
        if time.monotonic() - said > PROGRESS_SECONDS:
            said = time.monotonic()
            print(f"{name}: measured {chunk.stop:,} of {count:,} samples", file=sys.stderr, flush=True)
    return Lengths(tokens, views)


def _results(measure: Measure, chunks: list[range], count: int, workers: int) -> Iterator[NDArray[np.int32]]:
    if workers < 2 or count < FEW:
        yield from (_measure_chunk(chunk, measure) for chunk in chunks)
        return
    fork = multiprocessing.get_context("fork")  # inherits `measure`, which may hold what cannot be pickled
    with ProcessPoolExecutor(workers, fork, initializer=_inherit, initargs=(measure,)) as pool:
        yield from pool.map(_measure_chunk, chunks)


def _inherit(measure: Measure) -> None:
    global _measure
    _measure = measure


_measure: Measure


def _measure_chunk(chunk: range, measure: Measure | None = None) -> NDArray[np.int32]:
    measure = measure or _measure
    rows = np.zeros((2, len(chunk)), np.int32)
    for column, number in enumerate(chunk):
        try:
            rows[:, column] = measure(number)
        except BadSample:
            continue  # training meets it, and says why
    return rows
