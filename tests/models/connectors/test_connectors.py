"""Connectors: sizes, pooling at the edges, gradients."""

from __future__ import annotations

import pytest
import torch

from tests.support.tiny_models import assert_close
from vlm_train.contracts.media import Features, Grid3
from vlm_train.errors import ConfigError
from vlm_train.models.connectors.concat import ConcatLinear
from vlm_train.models.connectors.linear import Linear
from vlm_train.models.connectors.mlp import MLP
from vlm_train.models.connectors.pool import PooledMLP


def run(connector: torch.nn.Module, values: torch.Tensor, grid: Grid3) -> torch.Tensor:
    """`[N, P, D]` through a connector -> `[N, Q, D]`."""
    return connector(Features.from_rectangular(values, grid)).rectangular()


def test_mlp_is_the_llava_sequence():
    connector = MLP(in_dim=6, out_dim=8, depth=3)
    first, second, third = (connector.layers[i] for i in (0, 2, 4))
    x = torch.randn(2, 4, 6)
    gelu = torch.nn.functional.gelu
    assert_close(run(connector, x, Grid3(1, 2, 2)), third(gelu(second(gelu(first(x))))))


def test_linear_is_one_projection():
    connector = Linear(in_dim=6, out_dim=8)
    x = torch.randn(2, 4, 6)
    assert torch.equal(run(connector, x, Grid3(1, 2, 2)), x @ connector.proj.weight.T + connector.proj.bias)
    assert connector.token_grid(Grid3(1, 3, 5)) == (1, 3, 5)


def test_pooling_averages_neighbors_of_the_grid():
    connector = PooledMLP(in_dim=1, out_dim=1, pool=2, depth=1)
    torch.nn.init.ones_(connector.layers[0].weight)
    torch.nn.init.zeros_(connector.layers[0].bias)
    grid = torch.arange(15.0).view(1, 15, 1)  # 3 rows of 5
    # Edge cells average the patches that are left: (4+9)/2, then row 2 alone.
    expected = torch.tensor([3.0, 5.0, 6.5, 10.5, 12.5, 14.0]).view(1, 6, 1)
    assert_close(run(connector, grid, Grid3(1, 3, 5)), expected)
    assert connector.token_grid(Grid3(1, 3, 5)) == (1, 2, 3)


def test_perceptionlm_projects_before_it_pools():
    """MLPProjector of core/vision_projector/mlp.py: linear, GELU, linear, then the average."""
    torch.manual_seed(0)
    connector = PooledMLP(in_dim=6, out_dim=8, pool=2, project_first=True)
    values = torch.randn(3, 16, 6)
    image = connector.layers(values).transpose(1, 2).unflatten(2, (4, 4))
    expected = torch.nn.functional.adaptive_avg_pool2d(image, 2).flatten(2).transpose(1, 2)
    assert_close(run(connector, values, Grid3(1, 4, 4)), expected)
    whole = PooledMLP(in_dim=6, out_dim=8, pool=1, project_first=True)
    assert_close(run(whole, values, Grid3(1, 4, 4)), whole.layers(values))


def test_pooling_refuses_features_without_a_grid():
    connector = PooledMLP(in_dim=4, out_dim=4)
    with pytest.raises(ConfigError, match="connector.pool"):
        connector.token_grid(Grid3(1, 1, 577))
    with pytest.raises(ConfigError, match="connector.depth"):
        MLP(in_dim=2, out_dim=2, depth=0)


def test_pooling_of_everything_gives_one_token():
    connector = PooledMLP(in_dim=1, out_dim=1, pool=None, depth=1)
    torch.nn.init.ones_(connector.layers[0].weight)
    torch.nn.init.zeros_(connector.layers[0].bias)
    assert_close(run(connector, torch.arange(15.0).view(1, 15, 1), Grid3(1, 3, 5)), torch.tensor([[[7.0]]]))
    assert connector.token_grid(Grid3(1, 3, 5)) == (1, 1, 1)


def test_concatenation_is_minigpt4s_view_where_rows_are_multiples_of_four():
    connector = ConcatLinear(in_dim=6, out_dim=5)
    features = torch.randn(2, 64, 6)
    assert_close(run(connector, features, Grid3(1, 8, 8)), connector.proj(features.reshape(2, 16, 24)))
    assert connector.token_grid(Grid3(1, 16, 16)) == (1, 16, 4)


def test_concatenation_does_not_mix_rows():
    connector = ConcatLinear(in_dim=1, out_dim=4)
    torch.nn.init.eye_(connector.proj.weight)
    torch.nn.init.zeros_(connector.proj.bias)
    tokens = run(connector, torch.arange(1.0, 11.0).view(1, 10, 1), Grid3(1, 2, 5))
    assert tokens[0].tolist() == [[1, 2, 3, 4], [5, 0, 0, 0], [6, 7, 8, 9], [10, 0, 0, 0]]


def test_concatenation_refuses_features_without_a_grid():
    with pytest.raises(ConfigError, match=r"connector\.patches: features in a row of 257.*keep_cls=false"):
        ConcatLinear(in_dim=2, out_dim=2).token_grid(Grid3(1, 1, 257))
