"""Answers to the questions of a shard set, by greedy generation: every annotation of every sample is a question.

torch is imported where it is used, so that a configuration is checked without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from data_pipelines.sample import Annotation, Sample
from data_pipelines.shards.shard_set import ShardSet
from vlm_train.data.text.render import RenderOptions, TokenizedSample
from vlm_train.evaluation.common import Unusable, evaluation_mode, progress_bar
from vlm_train.evaluation.metrics.exact_match import matches

if TYPE_CHECKING:
    from torch import nn

    from vlm_train.data.images.plan import MediaViews
    from vlm_train.data.processor import Processor

Load = Callable[[int], tuple[Sample, list[bytes]]]
"""Number of a sample -> the sample and its media."""


@dataclass(frozen=True)
class Answer:
    """One answered question.

    Args:
        sample: number of its sample in the shard set.
        references: what counts as right; the first one is the answer of the annotation.
        prediction: the generated text without outer blanks.
    """

    sample: int
    key: str
    question: str
    references: tuple[str, ...]
    prediction: str

    @property
    def correct(self) -> bool:
        """Whether the prediction is one of the references, letter case aside."""
        return any(matches(self.prediction, reference) for reference in self.references)


@dataclass(frozen=True)
class Generator:
    """Asks a model the questions of a shard set, and says how.

    Args:
        batch: questions a call of the model.
        max_new_tokens: most tokens of an answer.
        all_answers: besides the answer of an annotation, those that `meta["annotations"]` lists for it are references.
    """

    model: nn.Module
    processor: Processor
    shards: ShardSet
    unusable: Unusable
    batch: int
    max_new_tokens: int
    all_answers: bool = False

    def answer(self, numbers: Sequence[int], load: Load | None = None) -> list[Answer]:
        """Answers to all questions of the numbered samples. `load` replaces what is loaded for a number."""
        from vlm_train.data.collate import collate_prompts

        model, processor, shards, answers = cast(Any, self.model), self.processor, self.shards, list[Answer]()
        with evaluation_mode(model):
            device = next(model.parameters()).device
            progress = progress_bar("questions", sum(shards.count_annotations(number) for number in numbers))
            for group in _group_items(self._prompts(numbers, load or shards.load_sample), self.batch):
                batch = collate_prompts([(prompt, views) for *_, prompt, views in group], processor.images)
                ids = model.generate(batch.to(device), max_new_tokens=self.max_new_tokens, eos_ids=processor.end_ids)
                for (number, asked, references, prompt, _), row in zip(group, ids.tolist(), strict=True):
                    text = processor.decode_answer(row).strip()
                    answers.append(Answer(number, prompt.key, asked, references, text))
                progress(len(group))
        return answers

    def _prompts(
        self, numbers: Sequence[int], load: Load
    ) -> Iterator[tuple[int, str, tuple[str, ...], TokenizedSample, MediaViews]]:
        for number in numbers:
            with self.unusable.catch_bad_sample(number):
                sample, blobs = load(number)
                views = self.processor.make_views(blobs)
                prompts = [
                    self.processor.render(sample, RenderOptions(annotations="first", annotation=k, generation=True))
                    for k in range(len(sample.annotations))
                ]
            if number not in self.unusable:
                for k, prompt in enumerate(prompts):
                    references = (prompt.reference, *(accepted_answers(sample, k) if self.all_answers else ()))
                    yield number, question_text(sample.annotations[k]), references, prompt, views


def question_text(annotation: Annotation) -> str:
    """The text of the last user turn."""
    return next((turn.text.strip() for turn in reversed(annotation.turns) if turn.role == "user"), "")


def reference_answer(annotation: Annotation) -> str:
    """The text of the last turn if it is an answer, else ""."""
    last = annotation.turns[-1]
    return last.text.strip() if last.role == "assistant" else ""


def accepted_answers(sample: Sample, k: int) -> tuple[str, ...]:
    """The answers that the sample's source lists for annotation `k`: `meta["annotations"][k]["answers"]`."""
    notes = sample.meta.get("annotations") or []
    return tuple(map(str, notes[k].get("answers") or ())) if k < len(notes) else ()


def _group_items(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    group = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
