"""Answers to the questions of a shard set, by greedy generation.

torch is imported where it is used, so that a configuration is checked without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from data_pipelines.errors import BadSample
from data_pipelines.sample import Annotation, Sample
from data_pipelines.shards.shard_set import ShardSet
from vlm_train.data.text.render import RenderOptions, TokenizedSample
from vlm_train.evaluation.common import Unusable, evaluation_mode, progress_bar
from vlm_train.evaluation.metrics.exact_match import matches
from vlm_train.evaluation.questions import Dialogue, Question, count_answers, is_dialogue, list_questions

if TYPE_CHECKING:
    from torch import nn

    from vlm_train.data.images.plan import MediaViews
    from vlm_train.data.processor import Processor

MOST_PAIRS = 2**28
"""Pairs of tokens of a batch of padded prompts: 256 prompts of 1024 tokens."""

Load = Callable[[int], tuple[Sample, list[bytes]]]
"""Number of a sample -> the sample and its media."""


@dataclass(frozen=True)
class Answer:
    """One answered question.

    Args:
        sample: number of its sample in the shard set.
        references: what counts as right; the first one is the answer of the annotation.
        prediction: the generated text without outer blanks.
        cut: the model did not end it within `max_new_tokens`.
    """

    sample: int
    key: str
    question: str
    references: tuple[str, ...]
    prediction: str
    cut: bool = False

    @property
    def correct(self) -> bool:
        """Whether the prediction is one of the references, letter case aside."""
        return any(matches(self.prediction, reference) for reference in self.references)


@dataclass
class Tally:
    """What else is to be told of the questions that were asked: samples that are dialogues, and prompts left out."""

    dialogues: set[int] = field(default_factory=set)
    too_long: int = 0


class _Asked(NamedTuple):
    sample: int
    question: Question
    prompt: TokenizedSample
    views: MediaViews


@dataclass(frozen=True)
class Generator:
    """Asks a model the questions of a shard set, and says how.

    Args:
        batch: questions a call of the model.
        max_new_tokens: most tokens of an answer.
        all_answers: besides the answer of an annotation, those that `meta["annotations"]` lists for it are references.
        dialogue: which questions of a dialogue are asked, and after which answers; see `ASKED`.
        join_references: annotations that ask the same are one question with several references.
        max_prompt_tokens: longer prompts are left out and counted; None: no limit.
    """

    model: nn.Module
    processor: Processor
    shards: ShardSet
    unusable: Unusable
    batch: int
    max_new_tokens: int
    all_answers: bool = False
    dialogue: Dialogue = "last"
    join_references: bool = False
    max_prompt_tokens: int | None = None

    def answer(self, numbers: Sequence[int], load: Load | None = None, tally: Tally | None = None) -> list[Answer]:
        """Answers to the questions of the numbered samples. `load` replaces what is loaded for a number.

        The questions of a dialogue are asked one after the other, so that a prompt holds the answers before it.
        """
        load, tally = load or self.shards.load_sample, tally or Tally()
        found: dict[tuple[int, int, int], Answer] = {}
        said: dict[tuple[int, int], list[str]] = {}
        progress = progress_bar("questions", sum(self.shards.count_annotations(number) for number in numbers))
        with evaluation_mode(self.model):
            left, place = list(numbers), 0
            while left:
                longer: set[int] = set()
                for group in _group_items(self._ask_questions(left, load, place, said, longer, tally), self.batch):
                    for asked, answer in zip(group, self._generate(group), strict=True):
                        at = asked.question
                        found[asked.sample, at.annotation, place] = answer
                        said.setdefault((asked.sample, at.annotation), []).append(answer.prediction)
                    progress(len(group))
                left, place = [number for number in left if number in longer], place + 1
        order = {number: index for index, number in enumerate(numbers)}
        return [found[at] for at in sorted(found, key=lambda at: (order[at[0]], *at[1:]))]

    def _ask_questions(
        self,
        numbers: Sequence[int],
        load: Load,
        place: int,
        said: dict[tuple[int, int], list[str]],
        longer: set[int],
        tally: Tally,
    ) -> Iterator[_Asked]:
        """The prompts of question number `place` of every dialogue; `longer` takes the samples that have more."""
        for number in numbers:
            prompts: list[_Asked] = []
            with self.unusable.catch_bad_sample(number):
                sample, blobs = load(number)
                if is_dialogue(sample):
                    tally.dialogues.add(number)
                views = self.processor.make_views(blobs, media=sample.media)
                for one in list_questions(
                    sample, self.dialogue, join=self.join_references, all_answers=self.all_answers
                ):
                    if one.place > place:
                        longer.add(number)
                    if one.place != place:
                        continue
                    own = said.setdefault((number, one.annotation), []) if self.dialogue == "own_history" else None
                    prompt = self._render(one.sample_with_answers(sample, own), tally)
                    if prompt is not None:
                        prompts.append(_Asked(number, one, prompt, views))
                    elif own is not None:
                        own.append("")  # never asked, and further questions are longer still
            if number not in self.unusable:
                yield from prompts

    def _render(self, sample: Sample, tally: Tally) -> TokenizedSample | None:
        """The prompt; None for one that is too long."""
        try:
            most = self.max_prompt_tokens
            return self.processor.render(sample, RenderOptions(annotations="first", generation=True, max_length=most))
        except BadSample as error:
            if error.kind != "too_long":
                raise
            tally.too_long += 1
            return None

    def _generate(self, group: Sequence[_Asked]) -> Iterator[Answer]:
        from vlm_train.data.collate import collate_prompts

        model, processor = cast(Any, self.model), self.processor
        batch = collate_prompts([(asked.prompt, asked.views) for asked in group], processor.images)
        device = next(model.parameters()).device
        ids = model.generate(batch.to(device), max_new_tokens=self.max_new_tokens, eos_ids=processor.end_ids)
        for asked, row in zip(group, ids.tolist(), strict=True):
            text = processor.decode_answer(row).strip()
            references = count_answers(asked.prompt.reference, asked.question.references)
            cut = len(row) >= self.max_new_tokens and not processor.ends_answer(row)
            yield Answer(asked.sample, asked.prompt.key, asked.question.text, references, text, cut)


def question_text(annotation: Annotation) -> str:
    """The text of the last user turn."""
    return next((turn.text.strip() for turn in reversed(annotation.turns) if turn.role == "user"), "")


def reference_answer(annotation: Annotation) -> str:
    """The text of the last turn if it is an answer, else ""."""
    last = annotation.turns[-1]
    return last.text.strip() if last.role == "assistant" else ""


def _group_items(items: Iterator[_Asked], size: int) -> Iterator[list[_Asked]]:
    """Groups of at most `size` items, and of few long ones: an explicit mask has `MOST_PAIRS` entries at most."""
    group, longest = list[_Asked](), 0
    for item in items:
        longest = max(longest, len(item.prompt.llm))
        if group and (len(group) == size or (len(group) + 1) * longest**2 > MOST_PAIRS):
            yield group
            group, longest = [], len(item.prompt.llm)
        group.append(item)
    if group:
        yield group
