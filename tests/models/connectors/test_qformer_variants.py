"""Q-Formers that select patches or read several levels: what is kept, that the head learns, who reads what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.tiny_models import assert_close
from vlm_train.contracts.media import Features, Grid3
from vlm_train.errors import ConfigError
from vlm_train.models.connectors.qformer import QFormerConnector
from vlm_train.models.layers.patch_selection import PatchSelection

SMALL = {
    "num_query_tokens": 3, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
    "intermediate_size": 32, "dropout": 0.0, "score_hidden": 8,
}  # fmt: skip


def connector(seed: int = 0, **changes: Any) -> QFormerConnector:
    torch.manual_seed(seed)
    model = QFormerConnector(**({"in_dim": 12, "out_dim": 10} | SMALL | changes))
    with torch.no_grad():  # large enough for patches to matter
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


def run(model: QFormerConnector, features: Tensor) -> Tensor:
    """`[N, P, D_v]` -> `[N, Q, D_t]`."""
    return model(Features.from_rectangular(features, Grid3(1, 1, features.shape[1]))).rectangular()


class FirstChannel(nn.Module):
    """Scores a patch by its first channel."""

    def forward(self, features: Tensor) -> Tensor:
        return features[..., :1]


def by_first_channel(**options: Any) -> PatchSelection:
    select = PatchSelection(dim=3, **options)
    select.score = FirstChannel()
    return select


def test_the_best_patches_enter_as_they_are_in_their_order() -> None:
    scores = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 0.0, 4.0, 1.0]])
    features = torch.cat([scores[..., None], torch.randn(2, 4, 2)], dim=-1)
    (kept,) = by_first_channel(budget=0.5)(features)
    assert torch.equal(kept, torch.stack([features[0, [1, 3]], features[1, [0, 2]]]))


@pytest.mark.parametrize(("budget", "patches", "count"), [(0.5, 257, 129), (64, 256, 64), (64, 16, 16), (0.01, 4, 1)])
def test_the_budget_is_a_share_or_a_number(budget: float, patches: int, count: int) -> None:
    assert PatchSelection(dim=4, budget=budget).count_selected(patches) == count


def test_mass_decides_how_many_of_the_budget_count() -> None:
    features = torch.zeros(3, 6, 3)
    features[0, 4, 0] = 20.0  # one patch has it all
    features[1, [1, 3], 0] = 20.0  # two share it
    kept, mask = by_first_channel(budget=4, mass=0.9)(features)  # the third has nothing that stands out
    assert kept.shape == (3, 4, 3) and mask.shape == (3, 1, 1, 4)
    assert mask.sum(dim=-1).flatten().tolist() == [1, 2, 4]
    assert kept[0][mask[0, 0, 0]][0, 0] == 20 and (kept[1][mask[1, 0, 0]][:, 0] == 20).all()


def test_patches_that_do_not_count_change_nothing() -> None:
    model = connector(budget=4, mass=0.6).eval()
    with torch.no_grad():
        model.qformer.select.score[-1].weight.mul_(30)
    features = torch.randn(5, 9, 12)
    kept, mask = model.qformer.select(features)
    counts = mask.sum(dim=-1).flatten().tolist()
    assert len(set(counts)) > 1, "else the test shows nothing"
    expected = []
    plain = connector().eval()
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if ".select." not in n})
    for view, seen in zip(kept, mask[:, 0, 0], strict=True):
        expected.append(run(plain, view[seen][None]))
    assert_close(run(model, features), torch.cat(expected))


def test_the_scores_have_a_gradient_although_features_enter_unscaled() -> None:
    model = connector(budget=4)
    run(model, torch.randn(2, 9, 12)).square().sum().backward()
    gradients = [parameter.grad for parameter in model.qformer.select.parameters()]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[:-1])


def test_the_head_learns_to_keep_the_patches_that_tell() -> None:
    """2 of 12 patches carry a mark and the answer; with room for 3, the head finds them."""
    model = connector(out_dim=1, budget=3, num_hidden_layers=2, num_query_tokens=1)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def task(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        features, answer = torch.randn(rows, 12, 12), torch.randn(rows, 1)
        places = torch.rand(rows, 12).topk(2).indices
        told = torch.cat([torch.full((rows, 2, 1), 2.0), answer[:, None].expand(rows, 2, 1)], dim=-1)
        features[..., :2] = 0
        features[..., :2].scatter_(1, places[..., None].expand(-1, -1, 2), told)
        return features, answer, places

    def found() -> float:
        features, _, places = task(256)
        best = model.qformer.select.score(features).squeeze(-1).topk(3).indices
        return (best[:, None] == places[..., None]).any(-1).float().mean().item()

    before = found()
    for _ in range(120):
        features, answer, _ = task(32)
        loss = (run(model, features).mean(dim=1) - answer).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < 0.3 and found() > 0.95, (before, found())


def test_early_blocks_read_early_levels() -> None:
    model = connector(levels=2).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(
        parameter.numel() for parameter in connector(in_dim=6).parameters()
    ) + 2 * (6 + 6)
    features = torch.randn(2, 5, 12, requires_grad=True)
    first, second = model.qformer.context(features)[::2]  # the keys of both cross-attentions
    (early,) = torch.autograd.grad(first.sum(), features, retain_graph=True)
    (late,) = torch.autograd.grad(second.square().sum(), features)
    assert not early[..., 6:].any() and late[..., 6:].any() and not late[..., :6].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 5}, "connector.levels: 5 levels do not fit features of width 12"),
        ({"levels": 3}, "connector.levels: 3, but only 2 blocks"),
        ({"budget": 1.5}, "connector.budget: 1.5"),
        ({"budget": 0}, "connector.budget: 0"),
        ({"mass": 0.5}, "set connector.budget"),
        ({"budget": 4, "mass": 1.5}, "connector.mass: 1.5"),
    ],
)
def test_refusals_name_the_setting(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        connector(**options)
