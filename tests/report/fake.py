"""A schedule folder as a finished four-stage run leaves it, with invented numbers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

START = 1_760_000_000.0
COLORS = {"red": "#e33", "blue": "#36c", "green": "#2a2", "yellow": "#ec3", "teal": "#2aa", "gray": "#999"}
SHAPES = ("circle", "rectangle", "triangle")
STAGES = {  # steps, seconds, first loss, last loss, loss names, first and last accuracy
    "easyvqa_clip": (300, 95, 4.6, 0.05, ("loss",), None),
    "easyvqa_lm": (150, 40, 3.4, 0.6, ("loss",), None),
    "easyvqa_stage1": (200, 60, 1.2, 0.4, ("loss",), (0.60, 0.83)),
    "easyvqa_stage2": (800, 240, 0.5, 0.02, ("loss", "lm/loss", "contrastive/loss"), (0.83, 0.984)),
}
EVALUATORS = {"answers": {"primary": "exact_match", "higher_is_better": {"exact_match": True, "cer": False}}}
RESULTS = [
    {"name": "easyvqa (this run)", "value": 0.984, "n": 9673, "note": "generation, exact match, all test questions"},
    {
        "name": "images shuffled",
        "value": 0.668,
        "n": 9673,
        "note": "this run's model, each question with another image",
    },
    {"name": "question only", "value": 0.670, "n": 9673, "note": "most frequent answer to the same question"},
    {"name": "CNN + LSTM", "value": 0.876, "n": None, "note": "published with the data set"},
]


def write_schedule(runs: Path) -> Path:
    """Write `runs/<stage>` for every stage and `runs/easyvqa-5e1f/schedule.json`; returns the schedule's folder."""
    start = START
    for name, (_, seconds, *_) in STAGES.items():
        write_run(runs / name, name, start)
        start += seconds + 15
    folder = runs / "easyvqa-5e1f"
    folder.mkdir(parents=True)
    stages = [{"recipe": name, "run": f"runs/{name}", "status": "done"} for name in STAGES]
    (folder / "schedule.json").write_text(json.dumps({"name": "easyvqa", "stages": stages}))
    return folder


def write_run(folder: Path, name: str, start: float = START) -> Path:
    """Write one stage's run folder; the last stage also has results, parameters and predictions."""
    steps, seconds, first, last, losses, accuracy = STAGES[name]
    folder.mkdir(parents=True)
    rng, final = random.Random(name), name == "easyvqa_stage2"
    record = {"run_id": folder.name, "recipe": name, "status": "done", "step": steps, "total_steps": steps}
    record |= {"evaluators": EVALUATORS if accuracy else {}}
    (folder / "run.json").write_text(json.dumps(record | ({"results": RESULTS} if final else {})))
    (folder / "config.yaml").write_text(
        f"seed: 42\nrecipe_name: {name}\nbatch:\n  samples: 64\n  tokens: null\n  micro: 16\noptim:\n"
        "  lr: 0.001\ntrainer:\n  precision: 32-true\n  epochs: 1.0\npaths:\n  data: ${oc.env:DATA,data}\n"
    )
    lines = []
    for step in range(0, steps + 1, 5):
        now, done = start + seconds * step / steps, step / steps
        value = last + (first - last) * math.exp(-5 * done)
        train = {metric: value * (1 + 0.08 * rng.gauss(0, 1)) for metric in losses}
        lines.append({"step": step, "time": now, "split": "train", **train, **rates(done)})
        if step % 50 == 0:
            val = dict.fromkeys(losses, value * 1.05)
            if accuracy:
                val["answers/exact_match"] = accuracy[0] + (accuracy[1] - accuracy[0]) * (1 - math.exp(-4 * done))
                val["answers/cer"] = 0.9 * (1 - val["answers/exact_match"])
            lines.append({"step": step, "time": now, "split": "val", **val})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if final:
        write_params(folder)
        write_predictions(folder / "eval" / "answers", rng)
        write_tried(folder / "predictions")
    return folder


def rates(done: float) -> dict[str, float]:
    """The other values of a training line."""
    norms = {"grad_norm": 2 - done, "grad_norm/llm": 1.5 - done, "grad_norm/connector": 0.5}
    shares = {"padding_share": 0.05, "supervised_share": 0.3, "data_wait": 0.01, "mfu": 0.41, "share/a": 0.5}
    speed = {"tokens_per_second": 9000.0, "tflops": 410.0, "peak_memory_gib": 71.5}
    return {"lr/llm": 1e-3 * (1 - done), "skipped": 0.0, **norms, **shares, **speed}


def write_tried(folder: Path) -> None:
    """Two samples asked at three validations; one has no picture."""
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (64, 64), "#e33").save(folder / "images" / "0.png")
    for step, color in ((200, "blue-ish"), (400, "blue-ish"), (800, "red-ish")):
        rows = [{"key": "a", "question": "what color?", "reference": "red", "prediction": color}]
        rows += [{"key": "b", "question": "what shape?", "reference": "circle", "prediction": "circle"}]
        rows[0]["image"] = "images/0.png"
        (folder / f"step-{step:08d}.json").write_text(json.dumps(rows))


def write_params(folder: Path) -> None:
    """The parameter table that a run prints at its start."""
    rows = [
        {"name": "vision", "parameters": 1_204_352, "trainable": False, "lr": None, "weight_decay": None},
        {"name": "connector", "parameters": 82_176, "trainable": True, "lr": 1e-3, "weight_decay": 0.0},
        {"name": "llm", "parameters": 1_573_248, "trainable": True, "lr": 5e-4, "weight_decay": 0.01},
    ]
    (folder / "params.json").write_text(json.dumps(rows))


def write_predictions(folder: Path, rng: random.Random, count: int = 120) -> None:
    """Drawn shapes with questions, about one in fifteen answered wrongly."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for index in range(count):
        shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
        image = Image.new("RGB", (64, 64), "#fdfdfb" if index % 2 else "#e8e4da")
        x, y, size = rng.randint(4, 24), rng.randint(4, 24), rng.randint(16, 34)
        draw, box = ImageDraw.Draw(image), (x, y, x + size, y + size)
        if shape == "triangle":
            draw.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=COLORS[color])
        else:
            (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=COLORS[color])
        image.save(folder / "images" / f"{index}.png")
        question, reference = rng.choice(
            [("what shape is in the image?", shape), (f"does the image contain a {shape}?", "yes"),
             (f"what color is the {shape}?", color)]
        )  # fmt: skip
        correct = rng.random() > 0.07
        wrong = {"yes": "no"}.get(reference, "gray" if reference in COLORS else "triangle")
        prediction = reference if correct else wrong
        row = {"key": f"test-{index}", "question": question, "reference": reference, "prediction": prediction}
        rows.append(row | {"correct": prediction == reference, "image": f"images/{index}.png"})
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
