"""The length index: how many tokens and patches every sample takes, known before any image is read.

A length depends on the shards, the template, the tokenizer, the media layout and the options of rendering, so it is
measured once for each such combination and kept in a small file (16 bytes a sample). What is measured is what training
renders: a row that was planned fits.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from data_pipelines.atomic_write import atomic_write
from data_pipelines.errors import BadSample, DataError
from data_pipelines.shards.mmap_arrays import UNREADABLE, map_arrays
from vlm_train.config.moved_targets import find_first_module

VERSION = 2  # of the files in the cache: others are not read
CHUNK = 512  # samples that a process measures at a time
FEW = 2000  # samples that are not worth starting processes for
SCANNED = 2**20  # samples that are looked at together
PROGRESS_SECONDS = 10.0

Measure = Callable[[int], list[tuple[int, int]]]


@dataclass(frozen=True)
class Lengths:
    """Tokens and patches of every piece of every sample `[P]`. A sample has one piece, unless it is split.

    Attributes:
        samples: the sample's number in its shard set, ascending.
        pieces: number of the piece in its sample.
        tokens: 0: the sample cannot be used, and is skipped in the order.
    """

    samples: NDArray[np.int32]
    pieces: NDArray[np.int32]
    tokens: NDArray[np.int32]
    patches: NDArray[np.int32]

    def find_longer(self, patches: int) -> tuple[int, int] | None:
        """How many have more than `patches` patches, and the first of them; None: none has."""
        found, first = 0, -1
        for start in range(0, len(self.patches), SCANNED):
            over = np.flatnonzero(self.patches[start : start + SCANNED] > patches)
            if len(over):
                found, first = found + len(over), start + int(over[0]) if first < 0 else first
        return (found, first) if found else None

    def slice_samples(self, first: int, stop: int) -> Lengths:
        """Those of samples `first` to `stop`."""
        part = slice(*np.searchsorted(self.samples, [first, stop]))
        return Lengths(*(getattr(self, field.name)[part] for field in fields(self)))


def cached_lengths(name: str, count: int, key: str, measure: Measure, cache: Path, workers: int) -> Lengths:
    """The lengths of `count` samples, from the cache or measured now. Processes that ask together measure once.

    Args:
        name: what the progress calls these samples.
        key: fingerprint of everything that a length depends on.
        measure: number of a sample -> tokens and patches of its pieces. Raises `BadSample` where it has none.
    """
    path = cache / f"{key[:24]}.npz"
    if (found := _read_file(path, count)) is not None:
        return found
    with _hold_lock(path.with_suffix(".lock")):
        if (found := _read_file(path, count)) is None:
            found = _measure_all(name, count, measure, workers)
            _write_file(path, found)
    return found


def hash_content(*things: Any) -> str:
    """Hash of plain data, dataclasses, functions (by name) and objects (by their attributes).

    Names are those of the modules in which things first stood: a moved module changes no hash.
    """
    return hashlib.sha256(json.dumps([*map(_describe_content, things)], sort_keys=True).encode()).hexdigest()


def _describe_content(thing: Any) -> Any:
    if thing is None or isinstance(thing, (bool, int, float, str)):
        return thing
    if isinstance(thing, dict):
        return {str(key): _describe_content(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [_describe_content(value) for value in thing]
    if isinstance(thing, partial):
        return [_describe_content(thing.func), _describe_content(thing.args), _describe_content(thing.keywords)]
    if hasattr(thing, "list_content"):  # what holds things of other libraries says itself what counts
        return _describe_content(thing.list_content())
    if hasattr(thing, "backend_tokenizer"):
        backend = hashlib.sha256(thing.backend_tokenizer.to_str().encode()).hexdigest()
        return [
            backend,
            _describe_content(thing.special_tokens_map),
            thing.all_special_tokens,
            _describe_content(thing.chat_template),
        ]
    if hasattr(thing, "__qualname__"):
        bound = getattr(thing, "__self__", None)  # of a method; built-in functions are bound to their module
        return [
            find_first_module(thing.__module__),
            thing.__qualname__,
            None if isinstance(bound, ModuleType) else _describe_content(bound),
        ]
    values = {f.name: getattr(thing, f.name) for f in fields(thing)} if is_dataclass(thing) else vars(thing)
    return [find_first_module(type(thing).__module__), type(thing).__qualname__, _describe_content(values)]


def _read_file(path: Path, count: int) -> Lengths | None:
    """The file, mapped: processes of a node share what they use of it."""
    try:
        arrays = map_arrays(path, checked=True)
        lengths = Lengths(*(arrays[field.name] for field in fields(Lengths)))
    except UNREADABLE:
        return None  # not there, cut short or damaged: measured again
    alike = len({len(getattr(lengths, field.name)) for field in fields(lengths)}) == 1
    return lengths if alike and _counts_through(lengths.samples, count) else None


def _counts_through(samples: NDArray[np.int32], count: int) -> bool:
    """Whether `samples` goes from 0 to `count` - 1, each number once or several times in a row."""
    if not len(samples) or samples[0] != 0 or samples[-1] != count - 1:
        return not len(samples) and not count
    for first in range(0, len(samples), SCANNED):
        steps = np.diff(samples[first : first + SCANNED + 1])
        if len(steps) and not 0 <= steps.min() <= steps.max() <= 1:
            return False
    return True


def _write_file(path: Path, lengths: Lengths) -> None:
    try:
        with atomic_write(path, "wb") as file:
            np.savez(file, allow_pickle=False, **{f.name: getattr(lengths, f.name) for f in fields(lengths)})
    except OSError as error:
        raise _cache_error(path, error) from error


@contextmanager
def _hold_lock(path: Path) -> Iterator[None]:
    with ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(path, fallback_to_soft=False))
        except OSError as error:  # some network file systems have no locks
            raise _cache_error(path, error) from error
        yield


def _cache_error(path: Path, error: OSError) -> DataError:
    return DataError(
        f"data.cache: {path} cannot be written: {error.strerror or error}. Measured lengths are kept there: make room, "
        "or name a folder that can be written and locked."
    )


def _measure_all(name: str, count: int, measure: Measure, workers: int) -> Lengths:
    chunks = [range(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]
    found = [np.zeros((0, 4), np.int32)]
    said = time.monotonic()
    for chunk, rows in zip(chunks, _measure_chunks(measure, chunks, count, workers)):
        found.append(rows)
        if time.monotonic() - said > PROGRESS_SECONDS:
            said = time.monotonic()
            print(f"{name}: measured {chunk.stop:,} of {count:,} samples", file=sys.stderr, flush=True)
    return Lengths(*np.concatenate(found).T.copy())


def _measure_chunks(measure: Measure, chunks: list[range], count: int, workers: int) -> Iterator[NDArray[np.int32]]:
    if workers < 2 or count < FEW:
        yield from (_measure_chunk(chunk, measure) for chunk in chunks)
        return
    fork = multiprocessing.get_context("fork")  # inherits `measure`, which may hold what cannot be pickled
    with ProcessPoolExecutor(workers, fork, initializer=_set_measure, initargs=(measure,)) as pool:
        yield from pool.map(_measure_chunk, chunks)


def _set_measure(measure: Measure) -> None:
    global _measure
    _measure = measure


_measure: Measure


def _measure_chunk(chunk: range, measure: Measure | None = None) -> NDArray[np.int32]:
    """`[P, 4]`: sample, piece, tokens, patches."""
    measure = measure or _measure
    rows: list[tuple[int, int, int, int]] = []
    for number in chunk:
        try:
            rows += [(number, piece, tokens, patches) for piece, (tokens, patches) in enumerate(measure(number))]
        except BadSample:
            rows.append((number, 0, 0, 0))  # training meets it, and says why
    return np.array(rows, np.int32).reshape(-1, 4)
