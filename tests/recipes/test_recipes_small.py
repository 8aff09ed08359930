"""Every recipe trains two steps and every schedule runs through, with size=tiny on a CPU."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines.media.limits import image_item
from data_pipelines.sample import Annotation, Media, Sample, Text, Turn
from data_pipelines.shards.tar_writer import ShardWriter
from tests.support.slow import run_few
from vlm_train import cli
from vlm_train.config.compose import compose_config
from vlm_train.config.folders import recipes_dir

RECIPES = sorted(path.stem for path in (recipes_dir() / "recipe").glob("*.yaml"))
FEW = (
    "blip_base", "blip2_stage1", "blip2_stage2_flant5", "clip_vitb32", "internvl25_2b", "internvl35_mpo",
    "llava15_lora", "llava_onevision_7b", "minigpt4_stage2", "molmo2_4b", "qwen25_vl_3b",
)  # fmt: skip
"""One of each family; the others are slow tests."""
SCHEDULES = sorted(path.stem for path in (recipes_dir() / "schedule").glob("*.yaml"))


def sample(number: int, kind: str) -> tuple[Sample, list[bytes]]:
    """A conversation of two questions with worse answers, a text-only one, or a caption."""
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (9 * number, 90, 200)).save(file, "PNG")
    blobs = [] if kind == "text" else [file.getvalue()]
    answer = Turn(role="assistant", parts=(Text(text=f"a shape of number {number}"),))
    if kind == "captions":
        annotations = (Annotation(turns=(Turn(role="user", parts=(Media(item=0),)), answer)),)
    else:
        show = () if kind == "text" else (Media(item=0),)
        ask = Turn(role="user", parts=(*show, Text(text="What is it?")))
        worse = Turn(role="assistant", parts=(Text(text=f"no shape, or number {number + 1}"),))
        annotations = (Annotation(turns=(ask, answer), rejected=worse),) * 2
    media = tuple(image_item(i, blob) for i, blob in enumerate(blobs))
    return Sample(key=f"{kind}-{number:02d}", media=media, annotations=annotations, source=kind), blobs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<kind>/tiny/{train,val}` for pictures with questions, text alone, and captions."""
    root = tmp_path_factory.mktemp("data")
    for kind in ("questions", "text", "captions"):
        for split, count in (("train", 12), ("val", 4)):
            folder = root / kind / "tiny" / split
            folder.parent.mkdir(parents=True, exist_ok=True)
            with ShardWriter(folder, source=kind, license="CC0", split=split, samples_per_shard=8) as writer:
                for number in range(count):
                    writer.write_sample(*sample(number, kind))
    return root


def kind_of(recipe: str) -> str:
    shards = compose_config([f"recipe={recipe}"]).data.train[0].shards
    return "captions" if "captions" in shards else "text" if "text" in shards else "questions"


@pytest.mark.parametrize("name", run_few(RECIPES, FEW))
def test_recipe_trains_small(name: str, data: Path, tmp_path: Path) -> None:
    overrides = [f"recipe={name}", "size=tiny", "trainer.max_steps=2", f"paths.data={data / kind_of(name)}"]
    overrides += ["run_name=small", f"paths.runs={tmp_path}", "init_from=[]", "trainer.log_every=1"]
    if name == "easyvqa_distill":
        overrides += ["reference.model=start"]  # the reader names the teacher's run
    packed = compose_config([f"recipe={name}"]).data.get("pack")
    if packed:  # one row of all samples, as at full size
        overrides += ["batch.micro=1"]
    assert cli.main(overrides) == 0
    run = tmp_path / "small"
    assert json.loads((run / "run.json").read_text())["status"] == "done"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train" and "loss" in line]
    assert losses and all(math.isfinite(loss) for loss in losses)
    if packed:
        assert lines[0]["padding_share"] == 0, "4 samples of several lengths in a row"
    assert (run / "checkpoints" / "LATEST").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "easyvqa"])  # `make demo` runs that one
def test_schedule_runs_small(name: str, data: Path, tmp_path: Path) -> None:
    overrides = [f"schedule={name}", "size=tiny", "trainer.max_steps=1", f"paths.data={data / 'questions'}"]
    assert cli.main([*overrides, f"paths.runs={tmp_path}"]) == 0
    stages = json.loads(next(tmp_path.glob(f"{name}-*/schedule.json")).read_text())["stages"]
    assert [stage["status"] for stage in stages] == ["done"] * len(stages)
