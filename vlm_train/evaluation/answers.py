"""Questions answered by greedy generation, and compared with the references by metrics of texts.

Next to the model's own result stand controls: what it reaches with the wrong images, and what the questions alone give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.shards.shard_set import ShardSet
from vlm_train.contracts.evaluator import Findings, ResultRow, TextMetric
from vlm_train.contracts.family import Generates
from vlm_train.distributed import process_rank
from vlm_train.errors import ConfigError
from vlm_train.evaluation.common import Unusable
from vlm_train.evaluation.controls import SHUFFLED_IMAGES, answer_by_majority, answer_with_other_images
from vlm_train.evaluation.generate import Answer, Generator, Tally
from vlm_train.evaluation.metrics.exact_match import ExactMatch
from vlm_train.evaluation.predictions import choose_pictures, save_pictures, write_predictions
from vlm_train.evaluation.questions import ASKED, Dialogue

if TYPE_CHECKING:
    from torch import nn

    from vlm_train.data.processor import Processor

CONTROLS = (SHUFFLED_IMAGES,)


class QuestionAnswering:
    """The questions of a shard set, which the model answers: those of every annotation of every sample.

    Args:
        shards: shard set with the questions.
        metrics: what compares answers with references, by name; null leaves one out. Default: exact match. The first
            value of the first metric is the primary one.
        all_answers: also accept the answers that a source lists besides that of the annotation (DocVQA, VQAv2).
        limit: first samples only.
        batch: questions a call of the model.
        max_new_tokens: most tokens of an answer. Answers that are cut there are counted in the table.
        max_prompt_tokens: longer prompts are left out, and counted in the table; null: data.max_length.
        dialogue: what is asked of an annotation with several questions: only the `last` one, after the reference
            answers; or every one, after the model's own answers (`own_history`), after the reference answers
            (`reference_history`), or by itself (`no_history`).
        join_references: annotations that ask the same, such as the captions of a picture, are one question, and the
            answers of all of them count as right.
        controls: `shuffled_images`: every question with another sample's image.
        majority_shards: shard sets whose most frequent answer to the same question is another control.
        published: results from elsewhere to stand beside ours: `{name, value, note, metric}`; `metric` is the primary
            one where it is left out.
        pictures: samples whose image is saved with the predictions; up to half of them were answered wrongly.
        at_validation: also run at every validation, without controls.
        validation_shards: shard set used there; null: `shards`.
        validation_limit: `limit` used there.
        seed: decides which image a question gets under `shuffled_images`.
    """

    needs = (Generates,)

    def __init__(
        self,
        *,
        shards: str,
        metrics: dict[str, TextMetric | None] | None = None,
        all_answers: bool = False,
        limit: int | None = None,
        batch: int = 256,
        max_new_tokens: int = 8,
        max_prompt_tokens: int | None = None,
        dialogue: str = "last",
        join_references: bool = False,
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
        if dialogue not in ASKED:
            raise ConfigError(f"eval: dialogue: {dialogue!r}; allowed: {', '.join(ASKED)}")
        chosen = {"exact_match": ExactMatch()} if metrics is None else metrics
        self.metrics: list[TextMetric] = [metric for metric in chosen.values() if metric is not None]
        self.higher_is_better = _collect_directions(self.metrics)
        self.primary = next(iter(self.higher_is_better))
        self.published = [_read_published(row, self.primary, self.higher_is_better) for row in published or ()]
        self.shards, self.limit, self.batch, self.max_new_tokens = shards, limit, batch, max_new_tokens
        self.max_prompt_tokens, self.join_references = max_prompt_tokens, join_references
        self.dialogue: Dialogue = dialogue  # type: ignore[assignment]
        self.all_answers, self.controls, self.majority_shards = all_answers, controls or [], majority_shards
        self.pictures, self.at_validation, self.seed = pictures, at_validation, seed
        self.validation_shards, self.validation_limit = validation_shards or shards, validation_limit
        self.reported: set[tuple[str, int]] = set()

    def run(self, model: nn.Module, processor: Processor, folder: Path, *, final: bool) -> Findings:
        """Answer the questions. `final` adds the controls and writes `predictions.jsonl` and images to `folder`.

        Raises:
            ConfigError: there is no question, or no sample that can be used.
        """
        shards = ShardSet(self.shards if final else self.validation_shards)
        limit = self.limit if final else self.validation_limit
        count = len(shards) if limit is None else min(limit, len(shards))
        unusable = Unusable(shards, self.reported)
        generator, tally = self._make_generator(model, processor, shards, unusable), Tally()
        answers = generator.answer(range(count), tally=tally)
        unusable.require_usable(count)
        if not answers:
            why = f"; {tally.too_long} prompts are longer than {generator.max_prompt_tokens} tokens"
            raise ConfigError(f"eval: {shards.address} holds no questions{why if tally.too_long else ''}")
        found = self.measure(answers)
        if not final:
            return Findings(found, self.primary, self.higher_is_better)
        told = self._describe_answers(answers, tally, generator.max_prompt_tokens)
        if told and process_rank() == 0:
            print(f"eval: {shards.address}: {len(answers):,} questions; {'; '.join(told)}", flush=True)
        note = ("" if count == len(shards) else f", first {count} samples") + unusable.note
        note += "".join(f", {one}" for one in told)
        compared = [("this run", f"generation, {{metric}}{note}", found, len(answers))]
        compared += self._measure_controls(generator, answers)
        rows: list[ResultRow] = []
        for metric in self.higher_is_better:
            for name, note, values, n in compared:
                rows.append(ResultRow(name, values[metric], n, note.format(metric=metric.replace("_", " ")), metric))
            rows += [row for row in self.published if row.metric == metric]
        if process_rank() == 0:
            paths = save_pictures(processor, shards, choose_pictures(answers, self.pictures), folder)
            write_predictions(folder, answers, paths)
        return Findings(found, self.primary, self.higher_is_better, tuple(rows))

    def _make_generator(
        self, model: nn.Module, processor: Processor, shards: ShardSet, unusable: Unusable
    ) -> Generator:
        return Generator(
            model,
            processor,
            shards,
            unusable,
            batch=self.batch,
            max_new_tokens=self.max_new_tokens,
            all_answers=self.all_answers,
            dialogue=self.dialogue,
            join_references=self.join_references,
            max_prompt_tokens=self.max_prompt_tokens or processor.max_length,
        )

    def _describe_answers(self, answers: Sequence[Answer], tally: Tally, most: int | None) -> list[str]:
        """What a reader of the table has to know: how dialogues were asked, what was cut and what was left out."""
        cut = sum(answer.cut for answer in answers)
        return [
            *([ASKED[self.dialogue]] if tally.dialogues else []),
            *([f"{cut:,} answers cut at {self.max_new_tokens} tokens (max_new_tokens)"] if cut else []),
            *([f"{tally.too_long:,} prompts of more than {most} tokens left out"] if tally.too_long else []),
        ]

    def measure(self, answers: Sequence[Answer]) -> dict[str, float]:
        """The values of all metrics, the primary one first.

        Raises:
            ConfigError: a metric does not return a number for every name that it declares.
        """
        predictions = [answer.prediction for answer in answers]
        references = [list(answer.references) for answer in answers]
        found: dict[str, float] = {}
        for metric in self.metrics:
            values: Any = metric(predictions, references)
            named = isinstance(values, Mapping) and values.keys() == metric.higher_is_better.keys()
            if not named or not all(isinstance(value, Real) for value in values.values()):
                wanted = ", ".join(metric.higher_is_better)
                raise ConfigError(
                    f"eval: {type(metric).__name__} returned {values!r}; expected a number for each of {wanted}, "
                    "which its higher_is_better declares."
                )
            found |= values
        return found

    def _measure_controls(
        self, generator: Generator, answers: Sequence[Answer]
    ) -> Iterator[tuple[str, str, dict[str, float], int]]:
        """Name, note, values and number of questions of every control."""
        usable = list(dict.fromkeys(answer.sample for answer in answers))
        if SHUFFLED_IMAGES in self.controls and len(usable) > 1:
            shuffled = answer_with_other_images(generator, usable, self.seed)
            note = "this run's model, each question with another sample's image"
            if shuffled:
                yield "images shuffled", note, self.measure(shuffled), len(shuffled)
        if self.majority_shards:
            guessed = answer_by_majority(answers, [ShardSet(folder) for folder in self.majority_shards])
            note = "most frequent training answer to the same question"
            yield "question only", note, self.measure(guessed), len(guessed)


def _collect_directions(metrics: Sequence[TextMetric]) -> dict[str, bool]:
    """Name -> whether higher is better, of every value. Raises ConfigError where there is none, or a name twice."""
    if not metrics:
        raise ConfigError("eval: metrics: none is left; choose one, or leave `metrics` out for exact match")
    names = [name for metric in metrics for name in metric.higher_is_better]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"eval: metrics: two of them return {twice[0]!r}; leave one out (null)")
    return {name: higher for metric in metrics for name, higher in metric.higher_is_better.items()}


def _read_published(row: Mapping[str, Any], primary: str, known: Mapping[str, bool]) -> ResultRow:
    metric = row.get("metric", primary)
    if metric not in known:
        raise ConfigError(f"eval: published: no metric {metric!r}; allowed: {', '.join(known)}")
    return ResultRow(row["name"], float(row["value"]), row.get("n"), row.get("note", ""), metric)
