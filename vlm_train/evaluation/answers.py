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
from vlm_train.data.render import Rendered, render
from vlm_train.data.show import save_views
from vlm_train.errors import ConfigError
from vlm_train.evaluation.common import Unusable, evaluating, progress_bar, views_of
from vlm_train.launch import rank

if TYPE_CHECKING:
    from vlm_train.build import Built

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

    def run(self, built: Built, folder: Path, *, final: bool) -> dict[str, Any]:
        """Answer the questions. `final` adds the controls and writes `predictions.jsonl` and images to `folder`.

        Returns:
            `accuracy` in [0, 1], `n` questions, `results`: rows `{name, value, n, note}`, empty unless `final`.
        """
        shards = ShardSet(self.shards if final else self.validation_shards)
        limit = self.limit if final else self.validation_limit
        count = len(shards) if limit is None else min(limit, len(shards))
        unusable = Unusable(shards, self.reported)
        answers = self.answers(built, shards, [(number, number) for number in range(count)], unusable)
        unusable.check(count)
        found: dict[str, Any] = {"accuracy": accuracy(answers), "n": len(answers), "results": []}
        if final:
            note = (
                "generation, exact match" + ("" if count == len(shards) else f", first {count} samples") + unusable.note
            )
            own = {"name": "this run", "value": found["accuracy"], "n": len(answers), "note": note}
            found["results"] = [own, *self._controls(built, shards, answers, unusable), *self.published]
            if rank() == 0:
                write_predictions(folder, answers, self._save_pictures(built, shards, answers, folder))
        return found

    def answers(
        self, built: Built, shards: ShardSet, pairs: Sequence[tuple[int, int]], unusable: Unusable
    ) -> list[Answer]:
        """Answers to all questions of every pair's first sample, asked with the images of its second."""
        from vlm_train.data.collate import collate_prompts

        eos_ids, model = end_ids(built), cast(Any, built.model)
        answers = []
        with evaluating(built.model):
            device = next(built.model.parameters()).device
            progress = progress_bar("questions", sum(shards.annotations(number) for number, _ in pairs))
            for group in _groups(self._prompts(built, shards, pairs, unusable), self.batch):
                batch = collate_prompts([(prompt, views) for _, _, prompt, views in group], built.image_size)
                ids = model.generate(batch.to(device), max_new_tokens=self.max_new_tokens, eos_ids=eos_ids)
                for (sample, asked, prompt, _), row in zip(group, ids.tolist(), strict=True):
                    text = normalised(decode(built, row, eos_ids))
                    answers.append(Answer(sample, prompt.key, asked, prompt.reference, text))
                progress(len(group))
        return answers

    def _prompts(
        self, built: Built, shards: ShardSet, pairs: Sequence[tuple[int, int]], unusable: Unusable
    ) -> Iterator[tuple[int, str, Rendered, list[np.ndarray]]]:
        for number, other in pairs:
            with unusable.watch(number):
                sample, blobs = shards.load(number)
                if other != number:
                    sample, blobs = _with_media_of(sample, *shards.load(other), shards)
                views = views_of(built, blobs)
                prompts = [self._prompt(built, sample, k) for k in range(len(sample.annotations))]
            if number not in unusable:
                for annotation, prompt in zip(sample.annotations, prompts, strict=True):
                    yield number, question(annotation), prompt, views

    def _prompt(self, built: Built, sample: Sample, k: int) -> Rendered:
        parts = built.template, built.tokenizer, built.layout
        return render(sample, *parts, annotations="first", annotation=k, generation=True, **built.rendering)

    def _controls(
        self, built: Built, shards: ShardSet, answers: Sequence[Answer], unusable: Unusable
    ) -> Iterator[dict[str, Any]]:
        usable = list(dict.fromkeys(answer.sample for answer in answers))
        if SHUFFLED_IMAGES in self.controls and len(usable) > 1:
            pairs = [(usable[i], usable[j]) for i, j in enumerate(derangement(len(usable), self.seed))]
            shuffled = self.answers(built, shards, pairs, unusable)
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

    def _save_pictures(self, built: Built, shards: ShardSet, answers: Sequence[Answer], folder: Path) -> dict[int, str]:
        """Saves what the model sees of some samples; returns sample number -> path relative to `folder`."""
        paths = {}
        for number in pictured(answers, self.pictures):
            _, blobs = shards.load(number)
            if views := views_of(built, blobs):
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


def end_ids(built: Built) -> list[int]:
    """Tokens that end an answer: the tokenizer's end-of-text and, if it is one token, what the template ends with."""
    tokenizer = built.tokenizer
    found = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    suffix = getattr(built.template, "assistant_suffix", "")
    end = None if "{eos}" in suffix else _one_token(tokenizer, suffix)
    return found if end is None or end in found else [*found, end]


def _one_token(tokenizer: Any, suffix: str) -> int | None:
    """The token that `suffix` is behind a word, or without its blanks; None where it is not one."""
    if (name := suffix.strip()) in tokenizer.get_vocab():
        return int(tokenizer.convert_tokens_to_ids(name))
    core = tokenizer.backend_tokenizer
    word, whole = (core.encode(text, add_special_tokens=False).ids for text in ("a", f"a{suffix}"))
    return int(whole[-1]) if len(whole) == len(word) + 1 and whole[:-1] == word else None


def decode(built: Built, ids: Sequence[int], eos_ids: Sequence[int]) -> str:
    """The text before the first ending token, and before what the template ends with, be it several tokens (`###`)."""
    end = next((position for position, token in enumerate(ids) if token in eos_ids), len(ids))
    text = str(built.tokenizer.decode(list(ids[:end]), skip_special_tokens=True))
    suffix = getattr(built.template, "assistant_suffix", "").strip()
    return text.partition(suffix)[0] if suffix and "{" not in suffix else text


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
