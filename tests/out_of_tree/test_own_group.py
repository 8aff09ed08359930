"""A family with a part that the core has no name for, chosen from a group of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.out_of_tree.command_line import TRUST, assert_resumes_exactly, read_weights, start
from tests.support.small_run import command, make_data
from vlm_train.check.check import check_config
from vlm_train.config.compose import compose_config
from vlm_train.config.run_identity import run_id
from vlm_train.contracts.batch import Batch
from vlm_train.errors import ConfigError
from vlm_train.models.families.prefix_vlm import PrefixVLM

WHERE = "tests.out_of_tree.test_own_group"


class Bottleneck(nn.Module):
    """Width -> rank -> width; the width is that of the language model."""

    def __init__(self, *, out_dim: int, rank: int = 64) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(out_dim, rank), nn.Linear(rank, out_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.up(self.down(hidden).relu())


class Narrowed(PrefixVLM):
    """A prefix model whose hidden states pass a part called `neck`."""

    def __init__(self, *, vision: Any, connector: Any, llm: Any, neck: Any) -> None:
        super().__init__(vision=vision, connector=connector, llm=llm)
        self.neck = neck

    def forward(self, batch: Batch, stream: str = "llm") -> Tensor:
        return self.neck(super().forward(batch, stream))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "conf/neck").mkdir(parents=True)
    lines = [f"_target_: {WHERE}.Bottleneck", "rank: 64", "tiny: {rank: 4}"]
    (tmp_path / "conf/neck/bottleneck.yaml").write_text("\n".join(lines) + "\n")
    make_data(tmp_path / "data")
    return tmp_path


def narrowed(folder: Path, *more: str, name: str = "run") -> list[str]:
    steps = ["trainer.max_steps=2", "trainer.save_every=1", "params=all", "lr_schedule.warmup_ratio=0"]
    own = [f"model._target_={WHERE}.Narrowed", "+neck@parts.neck=bottleneck"]
    searched = f'hydra.searchpath=["file://{folder / "conf"}"]'
    return command(folder / "data", folder, TRUST, searched, *steps, *own, *more, name=name)


def test_it_trains_resumes_and_is_planned(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_resumes_exactly(lambda name: narrowed(folder, name=name), folder)
    weights = read_weights(folder / "whole")
    assert weights["neck.down.weight"].shape == (4, 64), "rank of its tiny block, width of the language model"
    assert not torch.equal(weights["neck.up.weight"], read_weights(folder / "whole", 1)["neck.up.weight"])
    capsys.readouterr()
    assert start(narrowed(folder, "dry_run=true")) == 0
    assert "Round trip  a tiny copy was saved" in (printed := capsys.readouterr().out)
    assert any(line.split()[:1] == ["neck"] for line in printed.splitlines())
    assert start(["mode=show", f"run={folder / 'whole'}", TRUST]) == 0
    assert start(["mode=export", f"run={folder / 'whole'}", TRUST]) == 2
    assert "exporter.llava: model: Narrowed has no LLaVA equivalent" in capsys.readouterr().err


def test_a_part_without_a_block_has_no_tiny_copy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "conf/neck/bottleneck.yaml").write_text(f"_target_: {WHERE}.Bottleneck\n")
    whole = [one for one in narrowed(folder, "dry_run=true") if one != "size=tiny"]
    assert start(whole) == 0
    assert "Round trip  left out: no `tiny:` block says how parts.neck becomes small" in capsys.readouterr().out
    assert start(narrowed(folder, "dry_run=true")) == 2
    assert "size=tiny: parts.neck has no `tiny:` block" in capsys.readouterr().err


def test_it_decides_the_name_of_a_run(folder: Path) -> None:
    ids = {run_id(compose_config(narrowed(folder, *more, name="null"))) for more in ([], ["parts.neck.rank=5"])}
    assert len(ids) == 2


def test_wrong_parts_are_one_clear_error(folder: Path) -> None:
    wrong = {
        ("~parts.neck",): r"model\.neck is missing: .*Narrowed requires it\. Where it is a part, choose parts\.neck\.",
        ("+neck@parts.nek=bottleneck",): r"parts\.nek: .*Narrowed takes no such part\. Did you mean neck\? "
        r"Arguments: vision, connector, llm, neck\.",
        ("+neck@parts.vision=bottleneck",): r"parts\.vision: has a place of its own, vision=<option>\.",
        ("+parts.keys={_target_: x, tiny: {}}",): r"parts\.keys: a component cannot be called 'keys'",
        ("+parts.neck.rnk=3",): r"parts\.neck\.rnk: .* has no such option\. Did you mean parts\.neck\.rank\?",
    }
    for more, message in wrong.items():
        with pytest.raises(ConfigError, match=message):
            check_config(compose_config(narrowed(folder, *more)), need_assets=False)
