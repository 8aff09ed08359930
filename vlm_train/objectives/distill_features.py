"""Feature distillation: a student's vision features come closer to those of a frozen teacher.

Hints of FitNets (Romero et al. 2015, arXiv 1412.6550, equation 3), at the output of the vision encoder. The teacher is
the run's `reference.model`. Legend: F features of all views, D and E widths of student and teacher.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm_train.contracts.batch import Batch
from vlm_train.contracts.family import EncodesPatches
from vlm_train.contracts.media import Features
from vlm_train.contracts.objective import Loss, Objective, StepContext
from vlm_train.errors import ConfigError

DISTANCES = ("cosine", "mse")


class FeatureDistillation(Objective):
    """Distance of the student's vision features from the teacher's: the mean over the features of a view, added up over
    the views of a step and divided by its samples. Samples without pictures add 0.

    The student's part `feature_projection` maps its features to the teacher's width, where it has one.

    Args:
        weight: factor in the total loss.
        distance: `cosine`, 1 - cosine of both features, or `mse`, their mean squared difference.

    Raises:
        ConfigError: a value outside its range.
    """

    streams = ("llm",)
    normalized_by = "samples"
    needs = (EncodesPatches,)
    needs_reference = True

    def __init__(self, *, weight: float = 1.0, distance: Literal["cosine", "mse"] = "cosine") -> None:
        if distance not in DISTANCES:
            raise ConfigError(f"objective.features.distance: got {distance!r}; allowed: {', '.join(DISTANCES)}")
        self.weight, self.distance = weight, distance

    def __call__(self, model: Any, batch: Batch, context: StepContext) -> dict[str, Loss]:
        """`{features: Loss}`: sum over views, and number of samples.

        Raises:
            ConfigError: grids or widths of student and teacher differ.
        """
        assert context.reference is not None  # the run has one: `needs_reference`
        project = getattr(model, "feature_projection", None)
        with context.reference() as teacher:
            target = teacher.encode_patches(batch)
            if teacher is model and project is not None:  # its own reference, as in a dry run
                target = target.map(project)
        own = model.encode_patches(batch)
        found = own.map(project) if project is not None else own
        _require_same_shape(found, target, projected=project is not None)
        losses = self._compare_features(found.values.float(), target.values.float()) * _weigh_features(own, batch)
        count = losses.new_tensor(float(sum(map(len, batch.keys))))
        return {"features": Loss(losses.sum(), count, self.weight)}

    def _compare_features(self, student: Tensor, teacher: Tensor) -> Tensor:
        """`[F]`, distances of features `[F, E]`."""
        if self.distance == "cosine":
            return 1 - F.cosine_similarity(student, teacher, dim=-1)
        return (student - teacher).square().mean(dim=-1)


def _weigh_features(features: Features, batch: Batch) -> Tensor:
    """`[F]`: one over the features of its view; 0 for views of no media item, so that all ranks learn alike."""
    used = batch.media.inputs["vision"].views_total
    lengths = features.lengths
    shares = torch.tensor([1 / length if view < used else 0.0 for view, length in enumerate(lengths)])
    return shares.repeat_interleave(torch.tensor(lengths)).to(features.values.device, non_blocking=True)


def _require_same_shape(student: Features, teacher: Features, *, projected: bool) -> None:
    """Raises ConfigError unless features `[F, E]` of both belong to the same grids and have one width."""
    if student.grids != teacher.grids:
        one, other = next(pair for pair in zip(student.grids, teacher.grids) if pair[0] != pair[1])
        raise ConfigError(
            f"reference.model: the teacher's encoder has {tuple(other)} features a view (times, rows, columns), the "
            f"student's {tuple(one)}; feature distillation compares them one by one. Choose encoders with equal "
            "patch grids"
        )
    own, told = student.values.shape[-1], teacher.values.shape[-1]
    if own != told:
        add = "" if projected else "parts=feature_projection "
        raise ConfigError(
            f"reference.model: the teacher's vision features have width {told}, the student's {own}. Use "
            f"{add}parts.feature_projection.teacher_dim={told}"
        )
