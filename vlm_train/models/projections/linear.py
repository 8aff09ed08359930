"""A linear map from the width of a student's vision features to that of its teacher's (FitNets, arXiv 1412.6550)."""

from __future__ import annotations

from torch import Tensor, nn


class LinearProjection(nn.Module):
    """`[..., in_dim]` -> `[..., teacher_dim]`. Only `objective=distill_features` reads it; no answer depends on it.

    Args:
        in_dim: width of the vision encoder; given by `build.py`.
        teacher_dim: width of the teacher's vision encoder.
    """

    def __init__(self, *, in_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, teacher_dim)

    def forward(self, values: Tensor) -> Tensor:
        """`[..., in_dim]` -> `[..., teacher_dim]`, in the precision of its weights."""
        return self.linear(values.to(self.linear.weight.dtype))
