"""What an evaluation leaves to look at: `predictions.jsonl`, and the pictures of some samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.shards.shard_set import ShardSet
from vlm_train.data.images.plan import collect_pictures
from vlm_train.data.show import save_views
from vlm_train.evaluation.generate import Answer

if TYPE_CHECKING:
    from vlm_train.data.processor import Processor


def write_predictions(folder: Path, answers: Sequence[Answer], pictures: dict[int, str]) -> None:
    """Write `predictions.jsonl`, a line a question; `image` is relative to `folder` or null."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "predictions.jsonl", "w", encoding="utf-8") as file:
        for answer in answers:
            row = {
                "key": answer.key,
                "question": answer.question,
                "reference": answer.references[0],
                "prediction": answer.prediction,
                "correct": answer.correct,
                "image": pictures.get(answer.sample),
            }
            if answer.cut:
                row["cut"] = True  # not ended within max_new_tokens
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def save_pictures(processor: Processor, shards: ShardSet, numbers: Sequence[int], folder: Path) -> dict[int, str]:
    """Save what the model sees of the numbered samples; returns sample number -> path relative to `folder`."""
    paths = {}
    for number in numbers:
        _, blobs = shards.load_sample(number)
        if pictures := collect_pictures(processor.make_views(blobs)):
            paths[number] = f"images/{number}.png"
            save_views(pictures, folder / paths[number])
    return paths


def choose_pictures(answers: Sequence[Answer], most: int) -> list[int]:
    """Samples whose picture is worth keeping: up to half with a wrong answer, the others spread evenly over all."""
    wrong = list(dict.fromkeys(answer.sample for answer in answers if not answer.correct))
    chosen = dict.fromkeys(spread(wrong, most // 2))
    others = [number for number in dict.fromkeys(answer.sample for answer in answers) if number not in chosen]
    return sorted([*chosen, *spread(others, most - len(chosen))])


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` items, evenly spread over all."""
    count = min(len(items), most)
    return [items[index * len(items) // count] for index in range(count)]
