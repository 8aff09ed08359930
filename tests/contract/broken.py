"""Components that break their contract, each in one way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from tests.contract.broken_returns import NoLoss, PlainFeatures, PlainValue  # noqa: F401 - found by name
from vlm_train.contracts.batch import Batch
from vlm_train.contracts.evaluator import Findings
from vlm_train.contracts.media import Features, Grid3, MediaInput
from vlm_train.contracts.objective import Loss, StepContext
from vlm_train.data.images.plan import Views
from vlm_train.data.images.transform import ImageTransform
from vlm_train.data.text.template import ChatTemplate
from vlm_train.evaluation.metrics.exact_match import ExactMatch
from vlm_train.models.connectors.grids import same_grid
from vlm_train.models.connectors.linear import Linear
from vlm_train.models.families.prefix_vlm import PrefixVLM
from vlm_train.models.llms.hf import HFCausalLM
from vlm_train.models.llms.hf_seq2seq import HFSeq2Seq
from vlm_train.models.llms.text_tower import HFTextTower
from vlm_train.models.vision.hf import HFVision
from vlm_train.objectives.lm import LanguageModeling


class Silent(Linear):
    __doc__ = None


class WrongWidth(Linear):
    """Gives the width it was given."""

    def forward(self, features: Features) -> Features:
        return features.map(lambda values: values + self.proj(values).mean())


class WrongGrid(Linear):
    """Says that two patches make a token."""

    def __init__(self, *, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim)
        self.token_grid = halve


def halve(grid: Grid3) -> Grid3:
    return Grid3(1, 1, grid.size // 2)


class MixesViews(Linear):
    """Takes the mean of the whole batch away."""

    def forward(self, features: Features) -> Features:
        return super().forward(features.map(lambda values: values - values.mean(dim=0)))


class Idle(Linear):
    """Has a layer that nothing reads."""

    def __init__(self, *, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim)
        self.idle = nn.Linear(2, 2)


class NotIdle(Linear):
    """Declares its only weight unused."""

    def unused_parameters(self) -> list[str]:
        return ["proj.weight"]


class Hides(Linear):
    """Keeps a random tensor that is not saved."""

    def __init__(self, *, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim)
        self.noise = torch.randn(out_dim)

    def forward(self, features: Features) -> Features:
        noise = self.noise.to(features.values.device)
        return super().forward(features).map(lambda values: values + noise)


class Heavy(Linear):
    """Its grid function takes the weights along."""

    def __init__(self, *, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim)
        self.token_grid = self.grid_of

    def grid_of(self, grid: Grid3) -> Grid3:
        return grid


class Local(Linear):
    """Its grid function does not pickle."""

    def __init__(self, *, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim)
        self.token_grid = lambda grid: same_grid(grid)


class NeedsValues(Linear):
    """Names a device."""

    def __init__(self, *, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim)
        self.scale = nn.Parameter(torch.ones(1, device="cpu"))

    def forward(self, features: Features) -> Features:
        return super().forward(features).map(lambda values: values * self.scale)


class NoGrid(nn.Module):
    """Does not say how many tokens come out."""

    def __init__(self, *, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, out_dim)


class Raises(Linear):
    """Cannot run."""

    def forward(self, features: Features) -> Features:
        raise ArithmeticError("too hard")


class MeanOfBatch(HFVision):
    """A view depends on the others of its batch."""

    def encode(self, media: MediaInput) -> Features:
        features = super().encode(media)
        return features.map(lambda values: values - values.mean(dim=0))


class Transposed(HFVision):
    """Says another grid than it gives."""

    def encode(self, media: MediaInput) -> Features:
        features = super().encode(media)
        return Features(features.values, tuple(Grid3(1, 1, grid.size) for grid in features.grids))


class SeesAhead(HFCausalLM):
    """Adds the mean of the whole text."""

    def decode(self, embeds: Tensor, positions: Tensor, mask: Any, **given: Any) -> Tensor:
        hidden = super().decode(embeds, positions, mask, **given)
        return hidden + hidden.mean(dim=1, keepdim=True)


class IgnoresMask(HFCausalLM):
    """Is causal whatever the mask says."""

    def decode(self, embeds: Tensor, positions: Tensor, mask: Any, **given: Any) -> Tensor:
        return super().decode(embeds, positions, None, **given)


class LosesBlocks(HFCausalLM):
    """Makes the blocks and runs none."""

    def insert(self, make_block: Any, *, every: int = 1) -> nn.ModuleList:
        return nn.ModuleList(make_block() for _ in self.layers)

    def decode(self, embeds: Tensor, positions: Tensor, mask: Any, *, cross_states: Any = None) -> Tensor:
        return super().decode(embeds, positions, mask)


class ShortLogits(HFSeq2Seq):
    """Its head lacks a token."""

    def head(self, hidden: Tensor) -> Tensor:
        return super().head(hidden)[..., :-1]


class ReadsPadding(HFTextTower):
    """Adds the mean over the row, padding included."""

    def pooled(self, stream: Any) -> Tensor:
        return super().pooled(stream) + stream.ids.float().mean(dim=1, keepdim=True)


class NoFamily(nn.Module):
    """Inherits from nothing of ours."""

    def __init__(self, *, vision: Any, connector: Any, llm: Any) -> None:
        super().__init__()


class SkipsBlankViews(PrefixVLM):
    """Runs no encoder for a batch without images."""

    def embed(self, batch: Batch, stream: str = "llm") -> Tensor:
        if not len(batch.media.row):
            return self.llm.embed(batch.text[stream].ids)
        return super().embed(batch, stream)


class MixesRows(PrefixVLM):
    """A sample depends on the others of its batch."""

    def forward(self, batch: Batch, stream: str = "llm") -> Tensor:
        hidden = super().forward(batch, stream)
        return hidden + hidden.mean(dim=(0, 1))


class MeanLoss(LanguageModeling):
    """Returns a mean and not a sum."""

    def __call__(self, model: Any, batch: Batch, context: StepContext) -> dict[str, Loss]:
        found = super().__call__(model, batch, context)
        return {name: Loss(one.sum / one.count.clamp(min=1), one.count) for name, one in found.items()}


class PlainTensor(LanguageModeling):
    """Returns numbers in place of losses."""

    def __call__(self, model: Any, batch: Batch, context: StepContext) -> Any:
        return {name: one.sum for name, one in super().__call__(model, batch, context).items()}


class WrongStream(LanguageModeling):
    """Reads a stream that no model has."""

    def __init__(self) -> None:
        super().__init__()
        self.streams = ("lmm",)


class WrongDirection(ExactMatch):
    """Calls more matches worse."""

    higher_is_better: ClassVar[Mapping[str, bool]] = {"exact_match": False}


class OtherName(ExactMatch):
    """Returns another value than it declares."""

    higher_is_better: ClassVar[Mapping[str, bool]] = {"accuracy": True}


class UndeclaredFinding:
    """Finds another metric than it declares."""

    at_validation, needs, primary = True, (), "good"
    higher_is_better: ClassVar[Mapping[str, bool]] = {"good": True}

    def run(self, model: Any, processor: Any, folder: Path, *, final: bool) -> Findings:
        return Findings({"other": 1.0}, "other", {"other": True})


class ForgetfulExporter:
    """Writes nothing and finds it right."""

    def problems(self, model: Any) -> list[str]:
        return []

    def write(self, model: Any, processor: Any, folder: Path) -> str:
        return "everything"

    def verify(self, model: Any, folder: Path) -> float:
        return 0.5


class GreedyImporter:
    """Takes every folder."""

    def problems(self, folder: Path) -> list[str]:
        return []

    def adapt(self, cfg: Any, folder: Path) -> None: ...

    def read(self, model: Any, folder: Path) -> None: ...


class RandomPixels(ImageTransform):
    """Draws without its generator."""

    def __call__(self, data: bytes, generator: Any = None, where: str = "image", *, images: int = 1) -> Views:
        views = super().__call__(data, generator, where)
        noise = np.random.default_rng().integers(0, 2, views.values.shape, dtype=np.uint8)
        return Views(views.values ^ noise, views.grids)


class LearnsQuestions(ChatTemplate):
    """Learns all that is said."""

    def make_spans(self, turns: Sequence[Any], tokenizer: Any, *, generation: bool = False) -> Any:
        spans = super().make_spans(turns, tokenizer, generation=generation)
        return [type(one)(one.text, 1.0) if hasattr(one, "text") else one for one in spans]
