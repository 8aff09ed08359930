"""Small real runs for tests: twelve made pictures, a tiny LLaVA, a few steps."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from data_pipelines.media.limits import image_item
from data_pipelines.sample import Annotation, Media, Sample, Text, Turn
from data_pipelines.shards.tar_writer import ShardWriter
from vlm_train.config.compose import compose_config
from vlm_train.config.run_file import save_config
from vlm_train.config.run_identity import run_dir
from vlm_train.runs.folder import RunFolder
from vlm_train.training.fit import fit_run


def picture(number: int) -> bytes:
    file = io.BytesIO()
    image = Image.linear_gradient("L").convert("RGB").resize((40, 30))
    image.point([(v + 19 * number) % 256 for v in range(256)] * 3).save(file, "PNG")
    return file.getvalue()


def make_data(root: Path, bad: int | None = None, text_only: bool = False, rejected: bool = False) -> Path:
    """`tiny/{train,val}` under `root`; the picture of training sample `bad` breaks off after its header.

    `text_only`: samples of odd numbers have no picture. `rejected`: every answer has a worse one.
    """
    for split, count in (("train", 12), ("val", 4)):
        (root / "tiny").mkdir(parents=True, exist_ok=True)
        with ShardWriter(
            root / "tiny" / split, source="test", license="CC0", split=split, samples_per_shard=5
        ) as writer:
            for number in range(count):
                blob = picture(number)
                if split == "train" and number == bad:
                    blob = blob[: len(blob) // 2]
                shown = not (text_only and number % 2)
                question = Text(text=f"Which number is {number}?")
                ask = Turn(role="user", parts=(Media(item=0), question) if shown else (question,))
                answer = Turn(role="assistant", parts=(Text(text="shape " * (1 + number % 5) + str(number)),))
                worse = Turn(role="assistant", parts=(Text(text="thing " * (1 + number % 3)),)) if rejected else None
                annotation = Annotation(turns=(ask, answer), rejected=worse)
                media = (image_item(0, blob),) if shown else ()
                key = f"sample-{number:02d}"
                writer.write_sample(
                    Sample(key=key, media=media, annotations=(annotation,), source="test"),
                    [blob] if shown else [],
                )
    return root


def command(data: Path, runs: Path, *more: str, name: str = "run") -> list[str]:
    """Overrides of a small run: 6 steps of 4 samples in micro-batches of 2, a checkpoint every 2 steps."""
    fixed = ["recipe=easyvqa_stage2", "size=tiny", "batch.micro=2", "eval=none", "init_from=[]", "trainer.max_steps=6"]
    fixed += ["trainer.save_every=2", "trainer.keep_last=9", "trainer.val_every=null", "trainer.threads=1"]
    return [*fixed, f"paths.data={data}", f"paths.runs={runs}", f"run_name={name}", *more]


def train(overrides: list[str]) -> Path:
    """Run `fit` in this process; returns the run folder."""
    cfg = compose_config(overrides)
    save_config(cfg, RunFolder(run_dir(cfg)).config)
    fit_run(cfg)
    return run_dir(cfg)
