"""Learning-rate schedules, step by step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from tests.support.small_run import command, make_data, train
from vlm_train.build import build_lr_schedule
from vlm_train.checkpoint.files import MANIFEST, OWN_HASH
from vlm_train.config.compose import compose_config
from vlm_train.config.run_identity import run_id
from vlm_train.errors import ConfigError
from vlm_train.training.optim import adamw, cosine, epoch_decay


def rates(steps: int, **settings) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = epoch_decay(optimizer, total_steps=steps, **settings)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_a_rate_falls_from_one_pass_to_the_next() -> None:
    found = rates(12, epochs=3, factor=0.5, warmup_steps=2, min_ratio=0.3)
    assert found == pytest.approx([0.0, 1.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 0.6, 0.6, 0.6, 0.6])


def test_without_passes_it_stays() -> None:
    assert rates(3, epochs=None, factor=0.5) == [2.0] * 3


def ratios(total: int, *steps: int, **settings) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = cosine(optimizer, total_steps=total, **settings)
    return [schedule.lr_lambdas[0](step) for step in steps]


def test_a_cosine_may_count_the_warm_up() -> None:
    """minigpt4/common/optims.py: 9.707e-5 of 1e-4 at step 5,000 of 20,000, down to 8e-5."""
    counted = ratios(20_000, 5000, 20_000, warmup_steps=5000, min_ratio=0.8, warmup_counts=True)
    assert counted == pytest.approx([0.9707107, 0.8])
    assert ratios(20_000, 5000, 20_000, warmup_steps=5000, min_ratio=0.8) == pytest.approx([1.0, 0.8])


def test_a_warm_up_may_start_above_0() -> None:
    assert ratios(100, 0, 5, 10, 100, warmup_steps=10, start_ratio=0.01) == pytest.approx([0.01, 0.505, 1.0, 0.0])
    assert ratios(100, 0, 5, 10, 100, warmup_steps=10) == pytest.approx([0.0, 0.5, 1.0, 0.0])


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_a_group_with_its_own_warm_up_follows_the_schedule_of_one(kind: str) -> None:
    """Molmo2: 200 steps for the connector, 2,000 for the others (olmo/train/optim.py)."""

    def follow(own: list[int | None], warmup: int) -> list[list[float]]:
        groups: list[dict[str, Any]] = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 2.0} for _ in own]
        for one, steps in zip(groups, own, strict=True):
            one |= {} if steps is None else {"warmup_steps": steps}
        optimizer = torch.optim.SGD(groups)
        node = {"_target_": f"vlm_train.training.optim.{kind}", "warmup_steps": warmup}
        schedule = build_lr_schedule(OmegaConf.create({"lr_schedule": node}), optimizer, total_steps=20)
        found = []
        for _ in range(20):
            found.append([one["lr"] for one in optimizer.param_groups])
            optimizer.step()
            schedule.step()
        return found

    several = follow([2, None, 0], 8)
    for number, warmup in enumerate((2, 8, 0)):
        (alone,) = zip(*follow([None], warmup), strict=True)
        assert [row[number] for row in several] == list(alone), warmup


def test_a_warm_up_that_a_schedule_cannot_give_is_refused() -> None:
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 2.0, "warmup_steps": 2}])
    cfg = OmegaConf.create({"lr_schedule": {"_target_": "tests.training.test_optim.stepped"}})
    with pytest.raises(ConfigError, match=r"warmup_steps 2, but lr_schedule makes a StepLR"):
        build_lr_schedule(cfg, optimizer, total_steps=20)


def stepped(optimizer: torch.optim.Optimizer, *, total_steps: int) -> torch.optim.lr_scheduler.StepLR:
    return torch.optim.lr_scheduler.StepLR(optimizer, total_steps)


def group(*parameters: torch.Tensor) -> list[dict]:
    return [{"params": list(parameters)}]


def test_the_kernel_is_fused_where_there_is_one() -> None:
    weight = torch.zeros(2)
    assert adamw(group(weight), lr=1.0, fused="auto").param_groups[0]["fused"] is True
    assert adamw(group(weight), lr=1.0).param_groups[0]["fused"] is None
    assert adamw(group(weight, torch.zeros(2, device="meta")), lr=1.0, fused="auto").param_groups[0]["fused"] is False
    with pytest.raises(ConfigError, match=r"optim.fused=true: .* float32 on meta. Allowed: auto, false"):
        adamw(group(torch.zeros(2, device="meta")), lr=1.0, fused=True)


def test_fused_and_unfused_updates_agree_and_share_their_state() -> None:
    """A run may go on with the other kernel: the same numbers but for rounding, from the same state."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(1000, generator=generator) for _ in range(6)]

    def train(*kinds: bool) -> torch.Tensor:
        weight, state = torch.nn.Parameter(torch.ones(1000)), None
        for number, gradient in enumerate(gradients):
            if number % 3 == 0:
                optimizer = adamw(group(weight), lr=1e-2, weight_decay=0.1, fused=kinds[number // 3])
                if state is not None:
                    optimizer.state[weight] = state
            weight.grad = gradient.clone()
            optimizer.step()
            state = optimizer.state[weight]
        return weight.detach()

    plain = train(False, False)
    for kinds in ((True, True), (False, True), (True, False)):
        assert (train(*kinds) - plain).abs().max() <= 1e-6 * plain.abs().max()


def test_found_inf_prevents_an_update_of_the_fused_kernel() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = adamw(group(weight), lr=0.1, fused="auto")
    for veto in (1.0, 0.0):
        weight.grad = torch.ones(3)
        optimizer.found_inf = torch.tensor(veto)
        optimizer.step()
        assert torch.equal(weight.detach(), torch.ones(3)) == bool(veto)
        assert optimizer.state[weight]["step"] == 1.0 - veto


def manifest_of(run: Path, step: int) -> Path:
    return run / f"checkpoints/step-{step:08d}" / MANIFEST


def test_a_run_goes_on_with_the_kernel_that_it_began_with(tmp_path: Path) -> None:
    """A checkpoint of before `optim.fused` does not say it: its numbers are those of torch's own choice to the end."""
    data = make_data(tmp_path / "data")
    whole = train(command(data, tmp_path, "trainer.export=false", "optim.fused=null"))
    run = tmp_path / "again/run"
    shutil.copytree(whole, run)
    for step in (4, 6):
        shutil.rmtree(manifest_of(run, step).parent)
    (run / "run.json").unlink()
    held = json.loads(manifest_of(run, 2).read_text())
    del held["fused"], held[OWN_HASH]
    manifest_of(run, 2).write_text(json.dumps(held))
    train(command(data, tmp_path / "again", "trainer.export=false"))
    new = train(command(data, tmp_path, "trainer.export=false", name="new"))
    end, theirs, others = (load_file(manifest_of(one, 6).with_name("weights.safetensors")) for one in (run, whole, new))
    assert all(torch.equal(end[name], theirs[name]) for name in theirs)
    assert not all(torch.equal(end[name], others[name]) for name in theirs)
    assert [json.loads(manifest_of(one, 6).read_text())["fused"] for one in (run, new)] == [None, "auto"]


def test_the_kernel_names_no_other_run() -> None:
    line = ["recipe=easyvqa_stage2", "size=tiny"]
    auto, null, no = (
        run_id(compose_config([*line, *more])) for more in ((), ["optim.fused=null"], ["optim.fused=false"])
    )
    bare = compose_config(line)
    OmegaConf.set_struct(bare, False)
    del bare.optim["fused"]
    assert run_id(bare) == auto == null != no
