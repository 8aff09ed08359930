"""Answer accuracy: every annotation of every sample is a question, answered by greedy generation and matched exactly.

Next to the model's own result stand controls: what it reaches with the wrong images, and what the questions alone give.
torch is imported where it is used, so that a configuration is checked without it.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from data_pipelines.sample import Annotation, Sample
from data_pipelines.stream import ShardSet
from vlm_train.data.render import Rendered
from vlm_train.data.show import save_views
from vlm_train.errors import ConfigError
from vlm_train.evaluation.common import Unusable, evaluating, progress_bar
from vlm_train.launch import rank

if TYPE_CHECKING:
    from torch import nn

    from vlm_train.data.processor import Processor

SHUFFLED_IMAGES = "shuffled_images"
CONTROLS = (SHUFFLED_IMAGES,)


@dataclass(frozen=True)
class Answer:
    """One answered question; `sample` is its sample's number in the shard set."""

    sample: int
    key: str
    question: str
    reference: str
    prediction: str

    @property
    def correct(self) -> bool:
        """Whether the prediction is the reference, letter case aside."""
        return self.prediction == normalised(self.reference)


class AnswerAccuracy:
    """Share of questions whose generated answer equals the reference, letter case and outer blanks aside.

    Args:
        shards: shard set with the questions.
        limit: first samples only.
        batch: questions a call of the model.
        max_new_tokens: most tokens of an answer.
        controls: `shuffled_images`: every question with another sample's image.
        majority_shards: shard sets whose most frequent answer to the same question is another control.
        published: results from elsewhere to stand beside ours: `{name, value, note}`.
        pictures: samples whose image is saved with the predictions; up to half of them were answered wrongly.
        at_validation: also run at every validation, without controls.
        validation_shards: shard set used there; null: `shards`.
        validation_limit: `limit` used there.
        seed: decides which image a question gets under `shuffled_images`.
    """

    def __init__(
        self,
        *,
        shards: str,
        limit: int | None = None,
        batch: int = 256,
        max_new_tokens: int = 8,
        controls: list[str] | None = None,
        majority_shards: list[str] | None = None,
        published: list[dict[str, Any]] | None = None,
        pictures: int = 48,
        at_validation: bool = True,
        validation_shards: str | None = None,
        validation_limit: int | None = 200,
        seed: int = 0,
    ) -> None:
        if unknown := sorted(set(controls or ()) - set(CONTROLS)):
            raise ConfigError(f"eval: controls: {unknown[0]!r}; allowed: {', '.join(CONTROLS)}")
        self.shards, self.limit, self.batch, self.max_new_tokens = shards, limit, batch, max_new_tokens
        self.controls, self.majority_shards, self.published = controls or [], majority_shards, published or []
        self.pictures, self.at_validation, self.seed = pictures, at_validation, seed
        self.validation_shards, self.validation_limit = validation_shards or shards, validation_limit
        self.reported: set[tuple[str, int]] = set()

    def run(self, model: nn.Module, processor: Processor, folder: Path, *, final: bool) -> dict[str, Any]:
        """Answer the questions. `final` adds the controls and writes `predictions.jsonl` and images to `folder`.

        Returns:
            `accuracy` in [0, 1], `n` questions, `results`: rows `{name, value, n, note}`, empty unless `final`.
        """
        shards = ShardSet(self.shards if final else self.validation_shards)
        limit = self.limit if final else self.validation_limit
        count = len(shards) if limit is None else min(limit, len(shards))
        unusable = Unusable(shards, self.reported)
        answers = self.answers(model, processor, shards, [(number, number) for number in range(count)], unusable)
        unusable.check(count)
        found: dict[str, Any] = {"accuracy": accuracy(answers), "n": len(answers), "results": []}
        if final:
            note = (
                "generation, exact match" + ("" if count == len(shards) else f", first {count} samples") + unusable.note
            )
            own = {"name": "this run", "value": found["accuracy"], "n": len(answers), "note": note}
            found["results"] = [own, *self._controls(model, processor, shards, answers, unusable), *self.published]
            if rank() == 0:
                write_predictions(folder, answers, self._save_pictures(processor, shards, answers, folder))
        return found

    def answers(
        self,
        model: nn.Module,
        processor: Processor,
        shards: ShardSet,
        pairs: Sequence[tuple[int, int]],
        unusable: Unusable,
    ) -> list[Answer]:
        """Answers to all questions of every pair's first sample, asked with the images of its second."""
        from vlm_train.data.collate import collate_prompts

        generate, answers = cast(Any, model).generate, []
        with evaluating(model):
            device = next(model.parameters()).device
            progress = progress_bar("questions", sum(shards.annotations(number) for number, _ in pairs))
            for group in _groups(self._prompts(processor, shards, pairs, unusable), self.batch):
                batch = collate_prompts([(prompt, views) for _, _, prompt, views in group], processor.image_size)
                ids = generate(batch.to(device), max_new_tokens=self.max_new_tokens, eos_ids=processor.end_ids)
                for (sample, asked, prompt, _), row in zip(group, ids.tolist(), strict=True):
                    text = normalised(processor.decode_answer(row))
                    answers.append(Answer(sample, prompt.key, asked, prompt.reference, text))
                progress(len(group))
        return answers

    def _prompts(
        self, processor: Processor, shards: ShardSet, pairs: Sequence[tuple[int, int]], unusable: Unusable
    ) -> Iterator[tuple[int, str, Rendered, list[np.ndarray]]]:
        for number, other in pairs:
            with unusable.watch(number):
                sample, blobs = shards.load(number)
                if other != number:
                    sample, blobs = _with_media_of(sample, *shards.load(other), shards)
                views = processor.make_views(blobs)
                prompts = [
                    processor.render(sample, annotations="first", annotation=one, generation=True)
                    for one in range(len(sample.annotations))
                ]
            if number not in unusable:
                for annotation, prompt in zip(sample.annotations, prompts, strict=True):
                    yield number, question(annotation), prompt, views

    def _controls(
        self,
        model: nn.Module,
        processor: Processor,
        shards: ShardSet,
        answers: Sequence[Answer],
        unusable: Unusable,
    ) -> Iterator[dict[str, Any]]:
        usable = list(dict.fromkeys(answer.sample for answer in answers))
        if SHUFFLED_IMAGES in self.controls and len(usable) > 1:
            pairs = [(usable[i], usable[j]) for i, j in enumerate(derangement(len(usable), self.seed))]
            shuffled = self.answers(model, processor, shards, pairs, unusable)
            note = "this run's model, each question with another sample's image"
            yield {"name": "images shuffled", "value": accuracy(shuffled), "n": len(shuffled), "note": note}
        if self.majority_shards:
            guess = majority([ShardSet(folder) for folder in self.majority_shards])
            hits = [normalised(a.reference) == guess(a.question) for a in answers]
            note = "most frequent training answer to the same question"
            yield {
                "name": "question only",
                "value": float(np.mean(hits) if hits else 0.0),
                "n": len(hits),
                "note": note,
            }

    def _save_pictures(
        self, processor: Processor, shards: ShardSet, answers: Sequence[Answer], folder: Path
    ) -> dict[int, str]:
        """Saves what the model sees of some samples; returns sample number -> path relative to `folder`."""
        paths = {}
        for number in pictured(answers, self.pictures):
            _, blobs = shards.load(number)
            if views := processor.make_views(blobs):
                paths[number] = f"images/{number}.png"
                save_views(np.concatenate(views), folder / paths[number])
        return paths


def _with_media_of(sample: Sample, donor: Sample, blobs: list[bytes], shards: ShardSet) -> tuple[Sample, list[bytes]]:
    if len(donor.media) != len(sample.media):
        raise ConfigError(
            f"eval: {SHUFFLED_IMAGES} needs samples with equally many images, but {sample.key!r} has "
            f"{len(sample.media)} and {donor.key!r} {len(donor.media)} ({shards.address})"
        )
    return replace(sample, media=donor.media), blobs


def pictured(answers: Sequence[Answer], most: int) -> list[int]:
    """Samples whose picture is worth keeping: up to half with a wrong answer, the others spread evenly over all."""
    wrong = list(dict.fromkeys(answer.sample for answer in answers if not answer.correct))
    chosen = dict.fromkeys(spread(wrong, most // 2))
    others = [number for number in dict.fromkeys(answer.sample for answer in answers) if number not in chosen]
    return sorted([*chosen, *spread(others, most - len(chosen))])


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` items, evenly spread over all."""
    count = min(len(items), most)
    return [items[index * len(items) // count] for index in range(count)]


def normalised(text: str) -> str:
    """Text as it is compared: without outer blanks, in lower case."""
    return text.strip().lower()


def question(annotation: Annotation) -> str:
    """The text of the last user turn."""
    return next((turn.text.strip() for turn in reversed(annotation.turns) if turn.role == "user"), "")


def reference(annotation: Annotation) -> str:
    """The text of the last turn if it is an answer, else ""."""
    last = annotation.turns[-1]
    return last.text.strip() if last.role == "assistant" else ""


def accuracy(answers: Sequence[Answer]) -> float:
    """Share of correct answers; 0 without any."""
    return sum(answer.correct for answer in answers) / max(len(answers), 1)


def derangement(count: int, seed: int) -> list[int]:
    """A seeded permutation of `range(count)` that moves every number: one cycle in random order. `count` > 1."""
    order = np.random.default_rng(seed).permutation(count)
    moved = np.empty(count, np.int64)
    moved[order] = np.roll(order, 1)
    return [int(number) for number in moved]


def majority(sets: Sequence[ShardSet]) -> Callable[[str], str]:
    """Question text -> its most frequent answer in `sets`, or the most frequent of all for an unknown question."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for shards in sets:
        unusable = Unusable(shards)
        for number in range(len(shards)):
            with unusable.watch(number):
                for annotation in shards.load(number)[0].annotations:
                    counts[normalised(question(annotation))][normalised(reference(annotation))] += 1
        unusable.check(len(shards))
    total = sum(counts.values(), Counter[str]())
    return lambda asked: counts.get(normalised(asked), total).most_common(1)[0][0]


def write_predictions(folder: Path, answers: Sequence[Answer], pictures: dict[int, str]) -> None:
    """Write `predictions.jsonl`, a line a question; `image` is relative to `folder` or null."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "predictions.jsonl", "w", encoding="utf-8") as file:
        for answer in answers:
            row = {name: getattr(answer, name) for name in ("key", "question", "reference", "prediction", "correct")}
            file.write(json.dumps(row | {"image": pictures.get(answer.sample)}, ensure_ascii=False) + "\n")


def _groups(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    group = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
