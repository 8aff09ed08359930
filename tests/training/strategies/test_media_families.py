"""Families of tiles, native resolution and video on two ranks, of which one has text only and the other videos and
images; killed and started again under packing."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.media.limits import media_item
from data_pipelines.sample import Annotation, Media, Sample, Text, Turn
from data_pipelines.shards.tar_writer import ShardWriter
from tests.support.jobs import train_on_ranks
from tests.support.parity import encode, noise
from tests.support.small_run import train
from tests.support.videos import video
from tests.training.strategies.test_parity import ADAMW, STRATEGIES, assert_equal_runs
from tests.training.strategies.test_resume import AUDIT, assert_same_end

FAMILIES = {
    "onevision": ["recipe=llava_onevision_7b", "init_from=[]"],
    "internvl": ["recipe=internvl25_8b", "init_from=[]", "vision.drop_path=0"],
    "qwen25": ["recipe=qwen25_vl_3b"],
}
SGD = ["~optim.betas", "~optim.eps"]
OTHERS = {
    "molmo2": ["recipe=molmo2_4b_pretrain", "llm.response_residual_dropout=0", *SGD],
    "perceptionlm": ["recipe=perceptionlm_1b_stage2", "init_from=[]", "vision.drop_path=0", *SGD],
    "onevision15": ["recipe=llava_onevision15_4b_stage15", "init_from=[]", *SGD],
    "naflex": [
        "recipe=llava15_stage2",
        "init_from=[]",
        "vision=siglip2_so400m_naflex",
        "image=naflex",
        "image.max_num_patches=64",
    ],
}
"""Families whose towers hold parameters of their own, or whose plans make other views."""
EVERY = FAMILIES | OTHERS


@pytest.fixture(scope="session")
def media_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny/{train,val}`: every second sample is text only; the others show a video, two images, or one."""
    root = tmp_path_factory.mktemp("media")
    shown: list[list[bytes]] = [
        [video(4, (64, 48))], [encode(noise(61, 97)), encode(noise(32, 32))], [encode(noise(90, 60))],
    ]  # fmt: skip
    (root / "tiny").mkdir()
    for split, count in (("train", 12), ("val", 2)):
        with ShardWriter(root / "tiny" / split, source="test", license="CC0", split=split) as writer:
            for number in range(count):
                blobs = shown[number // 2 % 3] if number % 2 else []
                media = tuple(media_item(place, blob) for place, blob in enumerate(blobs))
                parts = (*(Media(item=place) for place in range(len(blobs))), Text(text=f"What is {number}?"))
                answer = Turn(role="assistant", parts=(Text(text=f"It is {number}."),))
                annotation = Annotation(turns=(Turn(role="user", parts=parts), answer))
                key = f"sample-{number:02d}"
                writer.write_sample(Sample(key=key, media=media, annotations=(annotation,), source="test"), blobs)
    return root


def job(family: str, data: Path, runs: Path, *more: str, name: str = "") -> list[str]:
    own = [*EVERY[family], "size=tiny", "eval=none", "params=all", "trainer.val_every=null", "trainer.threads=1"]
    own += ["data.annotations=dialogue", "data.max_length=1024", "trainer.export=false", "trainer.keep_last=9"]
    own += [f"paths.data={data}", f"paths.runs={runs}", f"run_name={name or family}", f"data.cache={runs}/lengths"]
    return [*own, *more]


def uneven(family: str, data: Path, runs: Path, *more: str, micro: int) -> list[str]:
    """Four steps of two samples in order: on two ranks one has text only."""
    own = [
        "optim=sgd",
        "optim.lr=0.01",
        "batch.samples=2",
        "batch.tokens=null",
        f"batch.micro={micro}",
        "data.shuffle=none",
    ]
    own += ["data.pack=null", "data.pack_patches=null", "trainer.max_steps=4", "data.workers=0"]
    return job(family, data, runs, *own, *more)


@pytest.fixture(scope="session")
def alone(media_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs on one rank, whose batches hold both kinds."""
    runs = tmp_path_factory.mktemp("alone")
    for family in EVERY:
        train(uneven(family, media_data, runs, micro=2))
    return runs


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "zero1"])
def test_one_rank_has_text_only_the_other_videos(strategy: str, media_data: Path, alone: Path, tmp_path: Path) -> None:
    jobs = (uneven(family, media_data, tmp_path, *STRATEGIES[strategy], micro=1) for family in EVERY)
    train_on_ranks(*jobs, limit=500)
    for family in EVERY:
        assert_equal_runs(alone / family, tmp_path / family)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_packed_and_killed_ends_as_if_it_was_not(strategy: str, media_data: Path, tmp_path: Path) -> None:
    own = [*STRATEGIES[strategy], *ADAMW, "batch.micro=1", "batch.samples=null", "batch.tokens=2048"]
    own += ["trainer.max_steps=6", "trainer.save_every=2", "allow_targets=[tests.]", "data.workers=1"]
    own += ["data.pack=1024"]  # a video of Qwen2.5-VL is 577 tokens
    for family in FAMILIES:
        audit = AUDIT.format(folder=tmp_path / "audit", at=3, rank=1)
        killed = job(family, media_data, tmp_path, *own, audit, name=f"{family}-killed")
        assert -9 in train_on_ranks(killed, check=False)
    names = [(family, which) for family in FAMILIES for which in ("whole", "killed")]
    jobs = [job(family, media_data, tmp_path, *own, name=f"{family}-{which}") for family, which in names]
    train_on_ranks(*jobs, limit=400)
    for family in FAMILIES:
        assert_same_end(tmp_path / f"{family}-whole", tmp_path / f"{family}-killed")
