"""Controls of generated answers: what the model reaches with the wrong images, and what the questions alone give."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from data_pipelines.sample import Sample
from data_pipelines.shards.shard_set import ShardSet
from vlm_train.errors import ConfigError
from vlm_train.evaluation.common import Unusable
from vlm_train.evaluation.generate import Answer, Generator, question_text, reference_answer
from vlm_train.evaluation.metrics.texts import normalize_text

SHUFFLED_IMAGES = "shuffled_images"


def answer_with_other_images(generator: Generator, numbers: Sequence[int], seed: int) -> list[Answer]:
    """Answers to the questions of the numbered samples, two or more, each asked with the images of another one.

    Raises:
        ConfigError: the samples have different numbers of images.
    """
    shards = generator.shards
    donors = {
        number: numbers[other] for number, other in zip(numbers, derange_numbers(len(numbers), seed), strict=True)
    }

    def load(number: int) -> tuple[Sample, list[bytes]]:
        sample, (donor, blobs) = shards.load_sample(number)[0], shards.load_sample(donors[number])
        if len(donor.media) != len(sample.media):
            raise ConfigError(
                f"eval: {SHUFFLED_IMAGES} needs samples with equally many images, but {sample.key!r} has "
                f"{len(sample.media)} and {donor.key!r} {len(donor.media)} ({shards.address})"
            )
        return replace(sample, media=donor.media), blobs

    return generator.answer(numbers, load)


def answer_by_majority(answers: Sequence[Answer], sets: Sequence[ShardSet]) -> list[Answer]:
    """The same questions, answered with the most frequent answer that `sets` give to each."""
    guess = majority_answer(sets)
    return [replace(answer, prediction=guess(answer.question)) for answer in answers]


def derange_numbers(count: int, seed: int) -> list[int]:
    """A seeded permutation of `range(count)` that moves every number: one cycle in random order. `count` > 1."""
    order = np.random.default_rng(seed).permutation(count)
    moved = np.empty(count, np.int64)
    moved[order] = np.roll(order, 1)
    return [int(number) for number in moved]


def majority_answer(sets: Sequence[ShardSet]) -> Callable[[str], str]:
    """Question text -> its most frequent answer in `sets`, or the most frequent of all for an unknown question."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for shards in sets:
        unusable = Unusable(shards)
        for number in range(len(shards)):
            with unusable.catch_bad_sample(number):
                for annotation in shards.load_sample(number)[0].annotations:
                    counts[normalize_text(question_text(annotation))][normalize_text(reference_answer(annotation))] += 1
        unusable.require_usable(len(shards))
    total = sum(counts.values(), Counter[str]())
    return lambda asked: counts.get(normalize_text(asked), total).most_common(1)[0][0]
