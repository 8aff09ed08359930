"""POPE: questions whether an object is in a picture, half of them about objects that are not (any annotated shard set).

Li et al. 2023, arXiv 2305.10355; code: github.com/AoiDragon/POPE. What is absent is drawn at random, or is what the set
shows most often (popular), or what it shows most often together with the object before (adversarial).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations

from data_pipelines.errors import BadSample, DataError
from data_pipelines.object_names import ObjectNames
from data_pipelines.sample import Annotation, Sample
from data_pipelines.shards.shard_set import ShardSet
from data_pipelines.sources import ListSource
from data_pipelines.sources.common.drawing import Dice
from data_pipelines.sources.common.samples import check_choice, make_exchange, make_sample

NEGATIVES = ("random", "popular", "adversarial")


class Pope(ListSource):
    """One sample per picture, with a question about each of `present` objects that it shows and of as many that it does
    not; with `rejected` one per question, because preference tuning reads one pair of a sample.

    Samples with fewer objects, or with another number of media than one picture, are passed over.

    Args:
        shards: the annotated shard set.
        negatives: which absent objects are asked for: random, popular or adversarial.
        objects: the vocabulary, object -> its further names, or a JSON file with it. What a picture shows is then what
            the answers and captions about it name.
        field: the list of what a picture shows is `meta[field]` instead. One of `objects` and `field` is given.
        present: objects asked for that a picture shows.
        question: with {} for the object and the article before it.
        rejected: every question is a sample, and the wrong answer is the rejected one, for preference tuning.
        seed: another one draws other objects at random.
        limit: first pictures that have enough objects only.

    Raises:
        DataError: an option out of its range, or no picture with enough objects.
    """

    def __init__(
        self,
        *,
        shards: str,
        negatives: str = "random",
        objects: Mapping[str, Sequence[str]] | str | None = None,
        field: str | None = None,
        present: int = 3,
        question: str = "Is there {} in the image?",
        rejected: bool = False,
        seed: int = 0,
        name: str = "pope",
        split: str = "test",
        limit: int | None = 500,
    ) -> None:
        self.negatives, self.seed, self.present = check_choice("negatives", negatives, NEGATIVES), seed, present
        self.name, self.split, self.question, self.rejected = name, split, question, rejected
        if (objects is None) == (field is None):
            raise DataError(
                "objects, field: give one of them: a vocabulary, or the name of a list in the samples' meta"
            )
        if present < 1 or (limit is not None and limit < 1) or question.count("{}") != 1:
            raise DataError(
                f"present {present}, limit {limit}, question {question!r}; allowed: from 1, from 1 or null, one {{}}"
            )
        self._shards, self._field = ShardSet(shards), field
        self._names = None if objects is None else ObjectNames(objects)
        self.license = ""
        self._shown = self._list_shown(limit)
        self._numbers = [*self._shown]
        if not self._shown:
            raise DataError(f"shards: {shards} has no picture with {present} known objects or more")
        counts = Counter(one for shown in self._shown.values() for one in shown)
        self._popular = _sort_by_count(counts)
        together: dict[str, Counter[str]] = {one: Counter() for one in counts}
        for shown in self._shown.values():
            for one, other in permutations(shown, 2):
                together[one][other] += 1
        self._together = {one: _sort_by_count(others) for one, others in together.items()}

    def _list_shown(self, limit: int | None) -> dict[int, list[str]]:
        """Sample number -> the objects that its picture shows, in the order in which they are named first."""
        found: dict[int, list[str]] = {}
        for i in range(len(self._shards)):
            items = self._shards.media_items(i)
            if len(items) != 1 or items[0].kind != "image":
                continue
            shown = self._name_objects(self._shards.read_sample(i))
            if len(shown) >= self.present:
                found[i] = shown
            if len(found) == limit:
                break
        return found

    def _name_objects(self, sample: Sample) -> list[str]:
        if self._names is None:
            listed = sample.meta.get(self._field or "") or []
            if isinstance(listed, str) or not isinstance(listed, Sequence):
                raise DataError(f"field: sample {sample.key!r}: meta {self._field} is no list: {str(listed)[:80]}")
            return list(dict.fromkeys(map(str, listed)))
        turns = (turn for one in sample.annotations for turn in one.turns if turn.role == "assistant")
        return list(dict.fromkeys(name for turn in turns for name in self._names.find_mentions(turn.text)))

    def __len__(self) -> int:
        return len(self._shown) * (2 * self.present if self.rejected else 1)

    def read_record(self, i: int) -> tuple[Sample, list[bytes]]:
        """The questions about one picture, "yes" and "no" in turns, or with `rejected` one of them."""
        picture, question = divmod(i, 2 * self.present) if self.rejected else (i, None)
        number = self._numbers[picture]
        sample, blobs = self._shards.load_sample(number)
        shown = self._shown[number]
        annotations, asked = list[Annotation](), list[str]()
        for one in shown[: self.present]:
            absent = self._pick_absent(one, {*shown, *asked}, Dice("pope", self.seed, sample.key, one))
            asked.append(absent)
            annotations += [self._make_question(one, "yes", "no"), self._make_question(absent, "no", "yes")]
        meta = {"objects": shown, "negatives": self.negatives}
        if question is None:
            return make_sample(self, sample.key, blobs, annotations, meta)
        return make_sample(self, f"{sample.key}-{question}", blobs, annotations[question : question + 1], meta)

    def _pick_absent(self, beside: str, known: set[str], dice: Dice) -> str:
        """An object that is not shown and was not asked for. Raises `BadSample` where there is none."""
        choices = {"popular": self._popular, "adversarial": self._together[beside], "random": []}[self.negatives]
        absent = next(_leave_out(choices, known), None)
        left = [*_leave_out(self._popular, known)]
        if absent is None and not left:
            raise BadSample("the picture shows all objects of the set, so that none can be absent", kind="objects")
        return dice.pick_one(sorted(left)) if absent is None else absent

    def _make_question(self, name: str, answer: str, other: str) -> Annotation:
        article = "an" if name[0].lower() in "aeiou" else "a"
        ask = self.question.format(f"{article} {name}")
        return make_exchange(ask, answer, rejected=other if self.rejected else None)


def _sort_by_count(counts: Counter[str]) -> list[str]:
    """Most frequent first, and by name among equals."""
    return sorted(counts, key=lambda name: (-counts[name], name))


def _leave_out(names: Sequence[str], known: set[str]) -> Iterator[str]:
    return (name for name in names if name not in known)
