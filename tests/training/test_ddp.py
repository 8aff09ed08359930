"""Two gloo ranks see the same global batches as one and end in the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from data_pipelines import build
from data_pipelines.sources.easy_vqa import EasyVQA

OVERRIDES = [
    "size=tiny", "run_name=ddp", "init_from=[]", "resume=never", "params=all", "optim=sgd",
    "~optim.betas", "optim.lr=0.1", "trainer.max_steps=3", "trainer.val_every=2", "batch.samples=4",
    "trainer.max_grad_norm=null",  # clipping would hide a wrong scale of the loss
]  # fmt: skip


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "recipe, micro, more",
    [
        pytest.param("easyvqa_stage1", (1, 1), [], marks=pytest.mark.slow),
        pytest.param("easyvqa_clip", (4, 2), [], marks=pytest.mark.slow),
        (
            "siglip_so400m",
            (4, 2),
            ["model.cache_chunk=1", "~optim.eps", "lr_schedule.warmup_steps=0", "optim.lr=0.005"],
        ),
        # Five samples in steps of four: in the last step one rank holds nothing.
        ("easyvqa_stage1", (2, 2), ["data.limit=5", "trainer.max_steps=2", "data.shuffle=none"]),
        pytest.param(
            "easyvqa_clip",
            (4, 2),
            ["data.limit=5", "trainer.max_steps=null", "trainer.epochs=1"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "easyvqa_blip2_stage1",
            (4, 2),
            ["objective.itc.gather_grad=true", "optim.lr=0.005", "params=connector_llm"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "easyvqa_blip2_stage1",
            (4, 2),
            [
                "objective.itc.gather_grad=true",
                "optim.lr=0.005",
                "params=connector_llm",
                "data.limit=5",
                "trainer.max_steps=2",
            ],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_ranks_equal_one(tmp_path: Path, recipe: str, micro: tuple[int, int], more: list[str]) -> None:
    for split in ("train", "val"):
        source = EasyVQA(split=split, captions=recipe != "easyvqa_stage1")
        source._ids = source._ids[: 11 if split == "train" else 1]  # one held-out sample: a rank has none
        build.write_shards(
            source,
            tmp_path / "data" / "tiny" / split,
            build={"split": split},
            samples_per_shard=100,
            max_shard_bytes=10**9,
            max_bad=0,
            overwrite=False,
        )
    weights, logs = [], []
    for devices in (1, 2):
        runs = tmp_path / f"runs{devices}"
        command = [sys.executable, "-m", "vlm_train", *OVERRIDES, f"recipe={recipe}", f"paths.data={tmp_path / 'data'}"]
        command += [f"paths.runs={runs}", f"launch.devices={devices}", f"batch.micro={micro[devices - 1]}", *more]
        subprocess.run(command, check=True, timeout=90, env={**os.environ, "OMP_NUM_THREADS": "1"})
        (last,) = (runs / "ddp/checkpoints/LATEST").read_text().split()
        weights.append(load_file(runs / "ddp/checkpoints" / last / "weights.safetensors"))
        logs.append([json.loads(line) for line in (runs / "ddp" / "metrics.jsonl").read_text().splitlines()])
    one, two = weights
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name] - two[name]).abs().max() <= 1e-5 * one[name].abs().max() + 1e-9, name
    for row, other in zip(*logs, strict=True):
        assert [other[key] for key in ("step", "split")] == [row[key] for key in ("step", "split")]
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-4) and other.get("skipped") == row.get("skipped")
