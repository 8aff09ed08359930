"""Answer accuracy: counting, controls and predictions, with a model that always gives the same answer."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from data_pipelines.errors import BadSample
from data_pipelines.sample import Annotation, Media, MediaItem, Sample, Text, Turn
from vlm_train.contracts.layout import GridLayout
from vlm_train.data.images.transform import ImageTransform
from vlm_train.data.processor import Processor
from vlm_train.data.text.template import ChatTemplate
from vlm_train.data.text.tokenizer import byte_level
from vlm_train.errors import ConfigError
from vlm_train.evaluation import answers
from vlm_train.evaluation.answers import QuestionAnswering
from vlm_train.evaluation.controls import derange_numbers
from vlm_train.evaluation.generate import Answer
from vlm_train.evaluation.metrics.character_error_rate import CharacterErrorRate
from vlm_train.evaluation.metrics.exact_match import ExactMatch
from vlm_train.evaluation.predictions import choose_pictures
from vlm_train.models.connectors.grids import same_grid

unreadable: set[int] = set()
broken: set[int] = set()


class Constant(torch.nn.Module):
    """Answers "Yes " to everything and remembers the mean pixel of every image it saw."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.ids, self.seen, self.modes = ids, [], set()

    def generate(self, batch, *, max_new_tokens, eos_ids):
        self.modes.add(self.training)
        self.seen += batch.media.inputs["vision"].values.float().mean(dim=(1, 2, 3)).int().tolist()
        return torch.tensor([[*self.ids, eos_ids[0], self.ids[0]]] * len(batch.text["llm"].ids))


class Shards:
    """Three samples of two questions; the image of sample i is of brightness 40 x i."""

    def __init__(self, folder: str) -> None:
        self.address = folder

    def describe_sample(self, i: int) -> str:
        return f"{self.address}/0.tar, key {self.key(i)!r}"

    def __len__(self) -> int:
        return 3

    def __iter__(self):
        return (self.load_sample(i) for i in range(3))

    def count_annotations(self, i: int) -> int:
        return 2

    def key(self, i: int) -> str:
        return f"s{i}"

    def load_sample(self, i: int):
        if i in unreadable:
            raise BadSample(f"x/0.tar, key 's{i}': member 0.png is corrupt")
        data = io.BytesIO()
        Image.new("RGB", (8, 8), (40 * i,) * 3).save(data, format="PNG")
        pairs = [("dark?", "yes" if i else "no"), ("colour?", "gray")]
        annotations = [
            Annotation(
                turns=(
                    Turn(role="user", parts=(Media(item=0), Text(text=asked))),
                    Turn(role="assistant", parts=(Text(text=answer),)),
                )
            )
            for asked, answer in pairs
        ]
        sample = Sample(
            key=f"s{i}", media=(MediaItem(name="0.png", width=8, height=8),), annotations=tuple(annotations)
        )
        return sample, [data.getvalue()[: 50 if i in broken else None]]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.setattr(answers, "ShardSet", Shards)
    unreadable.clear()
    broken.clear()
    tokenizer = byte_level()
    model = Constant(tokenizer("Yes ", add_special_tokens=False)["input_ids"])
    image = ImageTransform(mode="resize", size=(8, 8))
    template = ChatTemplate(media="first", assistant_suffix="{eos}")
    layout = GridLayout(image.grids, same_grid)
    processor = Processor(tokenizer=tokenizer, template=template, layout=layout, images={"vision": image})
    return SimpleNamespace(model=model, processor=processor)


def test_final_run_counts_questions_and_adds_controls(built: SimpleNamespace, tmp_path: Path) -> None:
    published = {"name": "elsewhere", "value": 0.5, "note": "published"}
    evaluator = QuestionAnswering(
        shards="x", batch=4, controls=["shuffled_images"], majority_shards=["x"], published=[published], pictures=2
    )
    built.model.train()
    found = evaluator.run(built.model, built.processor, tmp_path, final=True)
    assert (found.metrics, found.rows[0].n) == ({"exact_match": 2 / 6}, 6)
    assert [row.value for row in found.rows] == [2 / 6, 2 / 6, 5 / 6, 0.5]
    assert built.model.training and built.model.modes == {False}
    own, shuffled = built.model.seen[:6], built.model.seen[6:]
    assert own == [0, 0, 40, 40, 80, 80] and sorted(shuffled) == own
    assert all(a != b for a, b in zip(own, shuffled, strict=True))
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert rows[2] == {
        "key": "s1", "question": "dark?", "reference": "yes", "prediction": "Yes", "correct": True,
        "image": "images/1.png",
    }  # fmt: skip
    assert (tmp_path / "images/1.png").is_file() and rows[4]["image"] is None


def test_unusable_samples_are_named_and_left_out(
    built: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unreadable.add(0)
    broken.add(2)
    evaluator = QuestionAnswering(shards="x", controls=["shuffled_images"], majority_shards=["x"])
    assert evaluator.run(built.model, built.processor, tmp_path, final=False).metrics == {"exact_match": 1 / 2}
    found = evaluator.run(built.model, built.processor, tmp_path, final=True)
    assert (found.metrics, found.rows[0].n) == ({"exact_match": 1 / 2}, 2)
    assert [row.name for row in found.rows] == ["this run", "question only"]
    assert found.rows[0].note == "generation, exact match, 2 samples unusable"
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "eval: unusable, left out: x/0.tar, key 's0': member 0.png is corrupt"
    assert said[1].startswith("eval: unusable, left out: x/0.tar, key 's2': image: cannot decode")
    assert sum("s2" in line for line in said) == 1, "named once"


def test_nothing_usable_is_an_error(built: SimpleNamespace, tmp_path: Path) -> None:
    unreadable.update(range(3))
    with pytest.raises(ConfigError, match="none of the 3 samples of x can be used: x/0.tar, key 's0'"):
        QuestionAnswering(shards="x").run(built.model, built.processor, tmp_path, final=True)


def test_pictures_show_wrong_answers_and_a_spread_of_the_others() -> None:
    asked = [
        Answer(number, f"s{number}", "?", ("yes",), "no" if number in (70, 90) else "yes") for number in range(100)
    ]
    assert choose_pictures(asked, 10) == [0, 12, 24, 36, 49, 61, 70, 74, 86, 90]
    assert choose_pictures(asked[:3], 48) == [0, 1, 2] and choose_pictures(asked, 0) == []


def test_validation_is_limited_and_writes_nothing(built: SimpleNamespace, tmp_path: Path) -> None:
    found = QuestionAnswering(shards="x", validation_limit=1).run(built.model, built.processor, tmp_path, final=False)
    assert (found.metrics, found.rows) == ({"exact_match": 0.0}, ())
    assert list(tmp_path.iterdir()) == []


def test_every_metric_is_measured_on_answers_and_controls(built: SimpleNamespace, tmp_path: Path) -> None:
    """The model says "Yes"; the references are no, gray, yes, gray, yes, gray."""
    rate = (3 + 4 + 1 + 4 + 1 + 4) / (2 + 4 + 3 + 4 + 3 + 4)
    published = [{"name": "elsewhere", "value": 0.1, "metric": "cer"}]
    metrics = {"exact_match": ExactMatch(), "none": None, "cer": CharacterErrorRate()}
    evaluator = QuestionAnswering(shards="x", metrics=metrics, majority_shards=["x"], published=published)
    assert (evaluator.primary, evaluator.higher_is_better) == ("exact_match", {"exact_match": True, "cer": False})
    found = evaluator.run(built.model, built.processor, tmp_path, final=True)
    assert found.metrics == pytest.approx({"exact_match": 2 / 6, "cer": rate})
    told = [(row.name, row.metric, row.value) for row in found.rows]
    assert told == [
        ("this run", "exact_match", pytest.approx(2 / 6)),
        ("question only", "exact_match", pytest.approx(5 / 6)),
        ("this run", "cer", pytest.approx(rate)),
        ("question only", "cer", pytest.approx(3 / 20)),
        ("elsewhere", "cer", 0.1),
    ]
    assert found.rows[2].note == "generation, cer"


def test_metrics_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="two of them return 'exact_match'"):
        QuestionAnswering(shards="x", metrics={"a": ExactMatch(), "b": ExactMatch()})
    with pytest.raises(ConfigError, match="metrics: none is left"):
        QuestionAnswering(shards="x", metrics={"exact_match": None})
    with pytest.raises(ConfigError, match="published: no metric 'f1'; allowed: exact_match"):
        QuestionAnswering(shards="x", published=[{"name": "a", "value": 1.0, "metric": "f1"}])


@pytest.mark.parametrize(
    "returned", [{"other": 1.0}, {}, 1.0, {"exact_match": "good"}, {"exact_match": 1.0, "more": 2.0}]
)
def test_what_a_metric_returns_is_what_it_declares(
    built: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, returned: object
) -> None:
    monkeypatch.setattr(ExactMatch, "__call__", lambda self, predictions, references: returned)
    evaluator = QuestionAnswering(shards="x", metrics={"mine": ExactMatch()})
    with pytest.raises(ConfigError) as error:
        evaluator.run(built.model, built.processor, tmp_path, final=False)
    assert f"eval: ExactMatch returned {returned!r}; expected a number for each of exact_match" in str(error.value)


def test_answers_of_the_source_count_where_they_are_asked_for(
    built: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Listed(Shards):
        def load_sample(self, i: int):
            sample, blobs = super().load_sample(i)
            return replace(sample, meta={"annotations": [{"answers": ["maybe", "yes"]}]}), blobs

    monkeypatch.setattr(answers, "ShardSet", Listed)
    evaluator = QuestionAnswering(shards="x")
    assert evaluator.run(built.model, built.processor, tmp_path, final=False).metrics == {"exact_match": 2 / 6}
    evaluator = QuestionAnswering(shards="x", all_answers=True)
    assert evaluator.run(built.model, built.processor, tmp_path, final=False).metrics == {"exact_match": 3 / 6}


class Echo(Constant):
    """Answers with the length of its prompt, which is how much it was told before."""

    def __init__(self, tokenizer, cut: bool = False) -> None:
        super().__init__([])
        self.tokenizer, self.cut, self.prompts = tokenizer, cut, []

    def generate(self, batch, *, max_new_tokens, eos_ids):
        stream, rows = batch.text["llm"], []
        for ids, segments in zip(stream.ids, stream.segment_ids, strict=True):
            kept = [one for one in ids[segments != 0].tolist() if one >= 0]
            self.prompts.append(self.tokenizer.decode(kept, skip_special_tokens=True))
            rows.append(
                [*self.tokenizer(f"own{len(self.prompts)}", add_special_tokens=False)["input_ids"], *eos_ids[:1]]
            )
        return torch.tensor(rows)[:, : max_new_tokens if self.cut else None]


def dialogue(*pairs: tuple[str, str]) -> Annotation:
    turns = [Turn(role="system", parts=(Text(text="Be kind. "),))]
    for number, (asked, told) in enumerate(pairs):
        media = (Media(item=0),) if number == 0 else ()
        turns += [Turn(role="user", parts=(*media, Text(text=asked))), Turn(role="assistant", parts=(Text(text=told),))]
    return Annotation(turns=tuple(turns))


def shards_of(*samples: tuple[Annotation, ...], media: int = 1):
    """Shards of samples with these annotations about the picture of `Shards`."""

    class Some(Shards):
        def __len__(self) -> int:
            return len(samples)

        def count_annotations(self, i: int) -> int:
            return len(samples[i])

        def load_sample(self, i: int):
            sample, blobs = super().load_sample(i % 3)
            return replace(sample, key=f"s{i}", annotations=samples[i]), blobs

    return Some


@pytest.mark.parametrize(
    ("how", "questions", "prompts"),
    [
        ("last", ["q2", "q1"], ["q1r1q2", "q1"]),
        ("own_history", ["q1", "q2", "q1"], ["q1", "q1", "q1own1q2"]),
        ("reference_history", ["q1", "q2", "q1"], ["q1", "q1", "q1r1q2"]),
        ("no_history", ["q1", "q2", "q1"], ["q1", "q1", "q2"]),
    ],
)
def test_every_question_of_a_dialogue_is_asked_as_told(
    built, tmp_path, monkeypatch, capsys, how: str, questions: list[str], prompts: list[str]
) -> None:
    monkeypatch.setattr(
        answers,
        "ShardSet",
        shards_of(
            (dialogue(("q1", "r1"), ("q2", "r2")),),
            (
                dialogue(
                    ("q1", "own2"),
                ),
            ),
        ),
    )
    model = Echo(built.processor.tokenizer)
    found = QuestionAnswering(shards="x", dialogue=how).run(model, built.processor, tmp_path, final=True)
    assert ["".join(text.replace("Be kind.", "").split()) for text in model.prompts] == prompts
    assert found.rows[0].n == len(questions)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == questions
    assert [row["reference"] for row in rows] == [*(["r1", "r2"] if how != "last" else ["r2"]), "own2"]
    assert found.rows[0].note == f"generation, exact match, {answers.ASKED[how]}"
    assert f"eval: x: {len(questions)} questions; {answers.ASKED[how]}" in capsys.readouterr().out


def test_texts_about_the_same_picture_are_references_of_one_question(built, tmp_path, monkeypatch) -> None:
    captions = tuple(dialogue(("", text)) for text in ("a", "yes", "yes"))
    monkeypatch.setattr(answers, "ShardSet", shards_of(captions, (dialogue(("", "no")), dialogue(("other", "yes")))))
    found = QuestionAnswering(shards="x", join_references=True).run(built.model, built.processor, tmp_path, final=True)
    assert (found.rows[0].n, found.metrics) == (3, {"exact_match": 2 / 3})
    found = QuestionAnswering(shards="x").run(built.model, built.processor, tmp_path, final=True)
    assert (found.rows[0].n, found.metrics) == (5, {"exact_match": 3 / 5})


def test_cut_answers_and_long_prompts_are_counted(built, tmp_path, monkeypatch, capsys) -> None:
    shown = shards_of((dialogue(("q", "r")),), (dialogue(("q" * 400, "r"), ("and", "s")),))
    monkeypatch.setattr(answers, "ShardSet", shown)
    model = Echo(built.processor.tokenizer, cut=True)
    evaluator = QuestionAnswering(shards="x", max_new_tokens=4, max_prompt_tokens=300, dialogue="own_history")
    found = evaluator.run(model, built.processor, tmp_path, final=True)
    note = found.rows[0].note
    assert found.rows[0].n == 1 and "1 answers cut at 4 tokens (max_new_tokens)" in note
    assert "2 prompts of more than 300 tokens left out" in note and note.split(", ", 2)[
        2
    ] in capsys.readouterr().out.replace("; ", ", ")
    assert json.loads((tmp_path / "predictions.jsonl").read_text())["cut"] is True
    with pytest.raises(ConfigError, match="x holds no questions; 3 prompts are longer than 9 tokens"):
        QuestionAnswering(shards="x", max_prompt_tokens=9, dialogue="own_history").run(
            model, built.processor, tmp_path, final=True
        )


def test_the_limit_of_prompts_is_that_of_the_data(built, tmp_path) -> None:
    processor = replace(built.processor, max_length=3)
    with pytest.raises(ConfigError, match="holds no questions; 6 prompts are longer than 3 tokens"):
        QuestionAnswering(shards="x").run(built.model, processor, tmp_path, final=False)


def test_samples_without_a_partner_get_no_other_images(built, tmp_path, monkeypatch) -> None:
    class Mixed(Shards):
        def load_sample(self, i: int):
            sample, blobs = super().load_sample(i)
            if i:
                return sample, blobs
            texts = [
                replace(one, turns=tuple(replace(t, parts=t.parts[-1:]) for t in one.turns))
                for one in sample.annotations
            ]
            return replace(sample, media=(), annotations=tuple(texts)), []

    monkeypatch.setattr(answers, "ShardSet", Mixed)
    found = QuestionAnswering(shards="x", controls=["shuffled_images"]).run(
        built.model, built.processor, tmp_path, final=True
    )
    assert [(row.name, row.n) for row in found.rows] == [("this run", 6), ("images shuffled", 4)]


def test_unknown_ways_of_asking_are_refused() -> None:
    with pytest.raises(ConfigError, match="dialogue: 'all'; allowed: last, own_history, reference_history, no_history"):
        QuestionAnswering(shards="x", dialogue="all")


@pytest.mark.parametrize("count", [2, 3, 50])
def test_derangement_moves_every_number(count: int) -> None:
    moved = derange_numbers(count, seed=1)
    assert sorted(moved) == list(range(count))
    assert all(a != b for a, b in enumerate(moved))


def test_unknown_control_is_refused() -> None:
    with pytest.raises(ConfigError, match="shuffled_images"):
        QuestionAnswering(shards="x", controls=["blank"])


def test_questions_are_asked_in_batches_and_long_ones_in_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_train.evaluation import generate

    def group(lengths: list[int], size: int) -> list[list[int]]:
        items = [SimpleNamespace(prompt=SimpleNamespace(llm=range(length))) for length in lengths]
        return [[len(one.prompt.llm) for one in some] for some in generate._group_items(iter(items), size)]  # type: ignore[arg-type]

    assert group([1] * 7, 3) == [[1] * 3, [1] * 3, [1]]
    assert group([1] * 6, 3) == [[1] * 3, [1] * 3] and group([], 3) == []
    monkeypatch.setattr(generate, "MOST_PAIRS", 100)
    assert group([5, 5, 5, 5, 5, 2, 9, 1, 1], 9) == [[5] * 4, [5, 2], [9], [1, 1]]
