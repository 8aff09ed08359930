"""Controls of generated answers: what the model reaches with the wrong images, and what the questions alone give."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from data_pipelines.sample import Sample
from data_pipelines.shards.shard_set import ShardSet
from vlm_train.evaluation.common import Unusable
from vlm_train.evaluation.generate import Answer, Generator
from vlm_train.evaluation.metrics.texts import normalize_text
from vlm_train.evaluation.questions import list_questions

SHUFFLED_IMAGES = "shuffled_images"


def answer_with_other_images(generator: Generator, numbers: Sequence[int], seed: int) -> list[Answer]:
    """Answers to the questions of the numbered samples, each asked with the media of another one.

    Only samples with as many media of the same kinds stand in for each other. One that has no such partner, or no media
    at all, is not asked.
    """
    shards = generator.shards
    alike: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number in numbers:
        alike[tuple(item.kind for item in shards.load_sample(number)[0].media)].append(number)
    donors = {
        number: group[other]
        for kinds, group in alike.items()
        if kinds and len(group) > 1
        for number, other in zip(group, derange_numbers(len(group), seed), strict=True)
    }

    def load(number: int) -> tuple[Sample, list[bytes]]:
        sample, (donor, blobs) = shards.load_sample(number)[0], shards.load_sample(donors[number])
        return replace(sample, media=donor.media), blobs

    return generator.answer([number for number in numbers if number in donors], load)


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
                for one in list_questions(shards.load_sample(number)[0], "reference_history"):
                    counts[normalize_text(one.text)][normalize_text(one.reference)] += 1
        unusable.require_usable(len(shards))
    total = sum(counts.values(), Counter[str]())
    return lambda asked: counts.get(normalize_text(asked), total).most_common(1)[0][0]
