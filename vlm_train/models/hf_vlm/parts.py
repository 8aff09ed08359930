"""The parts of a whole model of `transformers`, found from its own structure.

The library nests a model's modules as it likes. Here each is registered once, under the part that it belongs to
(`vision`, `connector`, `llm`, and `audio` where there is one), so that rules, adapters, checkpoints and strategies find
it as they do in other families. The library's model itself is kept beside them, not registered: it calls the modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from vlm_train.contracts.layout import MediaSize
from vlm_train.contracts.media import Features, Grid3, MediaInput
from vlm_train.errors import ConfigError
from vlm_train.models.hf_vlm.processor import LibraryProcessor
from vlm_train.models.llms.hf import scale_logits
from vlm_train.models.llms.mixers import mixers_without_mask

TOWERS = (
    "vision_tower", "visual", "vision_model", "vision_encoder", "image_tower", "vision_backbone", "image_encoder",
    "vision", "vit",
)  # fmt: skip
"""Names of vision encoders in the library."""
DECODERS = ("language_model", "text_model", "text_decoder", "decoder")
CONNECTORS = ("merger", "projector", "aligner", "connector", "resampler", "qformer", "abstractor")
"""Words in the names of modules inside a tower that lead to the width of the language model."""
Paths = dict[str, dict[str, str]]
"""Part -> name of a module or parameter in it -> its path in the library's model."""


class Part(nn.Module):
    """Modules of the library's model that belong together, under their own names there.

    Attributes:
        model: the library's model, which is not registered here.
    """

    model: Any

    def __init__(self, whole: nn.Module, paths: Mapping[str, str], weights: str | None) -> None:
        super().__init__()
        self.paths, self.weights = dict(paths), weights
        object.__setattr__(self, "model", whole)
        for name, path in paths.items():
            found = _follow(whole, path)
            if isinstance(found, nn.Parameter):
                self.register_parameter(name, found)
            else:
                self.add_module(name, found)

    def __setattr__(self, name: str, value: Any) -> None:
        """What is put in the place of a module or parameter, an adapter or a shard, the library's model calls too."""
        super().__setattr__(name, value)
        if name in self.__dict__.get("paths", ()):
            parent, _, own = self.paths[name].rpartition(".")
            holder = self.model.get_submodule(parent)
            if own in holder.__dict__:  # see `detach_nested`
                object.__setattr__(holder, own, value)
            else:
                setattr(holder, own, value)

    @property
    def layers(self) -> nn.ModuleList | None:
        """The numbered layers: the longest list of them."""
        lists = [one for one in self.modules() if isinstance(one, nn.ModuleList) and len(one)]
        return max(lists, key=lambda one: sum(p.numel() for p in one.parameters()), default=None)

    def name_in_library(self, name: str) -> str:
        """The name in the library's model of a parameter or buffer of this part."""
        own, _, rest = name.partition(".")
        return f"{self.paths[own]}.{rest}" if rest else self.paths[own]


class Tower(Part):
    """The vision encoder: a `VisionEncoder` whose plan is the library's own processor.

    Attributes:
        processor: makes its input; its image plan is given it.
    """

    image_size = None
    image_mean = image_std = (0.5, 0.5, 0.5)  # the processor's business
    patch_size, frames_per_patch = 16, 1

    def __init__(self, whole: nn.Module, paths: Mapping[str, str], weights: str | None, processor: Any) -> None:
        super().__init__(whole, paths, weights)
        self.processor: LibraryProcessor = processor
        self.patch_grid = partial(count_patches, processor=processor)
        self.out_dim = int(getattr(getattr(whole.config, "vision_config", whole.config), "hidden_size", 0))

    def encode(self, media: MediaInput) -> Features:
        """Whole models encode inside their own forward pass."""
        raise NotImplementedError("a whole model of transformers encodes images inside its own forward pass")


def count_patches(size: MediaSize, processor: LibraryProcessor) -> Grid3:
    """An image's tokens, in one row."""
    return Grid3(1, 1, processor.count_tokens(size))


class Connector(Part):
    """What lies between tower and language model, single parameters included."""

    def token_grid(self, grid: Grid3) -> Grid3:
        """The tower's plan counts tokens already."""
        return grid


class Decoder(Part):
    """The language model with its head.

    Attributes: as of `LanguageModel`.
    """

    position_axes = 1  # those of M-RoPE are found in forward

    def __init__(self, whole: Any, paths: Mapping[str, str], weights: str | None, takes_packed: bool) -> None:
        super().__init__(whole, paths, weights)
        embedding = whole.get_input_embeddings().weight
        self.dim, self.base_vocab_size = int(embedding.shape[1]), int(embedding.shape[0])
        head = whole.get_output_embeddings()
        if head is None:
            raise ConfigError(f"model.name: {type(whole).__name__} has no head over its vocabulary that can be found")
        self.vocab_size = int(head.weight.shape[0])
        self.takes_packed = takes_packed
        text = whole.config.get_text_config()
        self.unmasked_mixers = mixers_without_mask(self.layers or (), getattr(text, "layer_types", None) or ())

    def head(self, hidden: Tensor) -> Tensor:
        """`[..., D]` -> `[..., V]`, scaled and soft-capped as the model's configuration says."""
        return scale_logits(self.model.get_output_embeddings()(hidden), self.model.config.get_text_config())


def find_paths(whole: Any) -> Paths:
    """What belongs to which part.

    Raises:
        ConfigError: the model has no language model, or no vision encoder, that the library or its names tell.
    """
    head, decoder = whole.get_output_embeddings(), _find(whole, DECODERS)
    tower = _find(whole, TOWERS)
    for what, found in (("language model", decoder), ("vision encoder", tower)):
        if found is None:
            names = ", ".join(dict.fromkeys(name for name, _ in _walk(whole)))
            raise ConfigError(f"model.name: no {what} was found in {type(whole).__name__}, whose modules are {names}")
    texts = {id(one) for one in (head, decoder, whole.get_input_embeddings()) if one is not None}
    paths: Paths = {"vision": {}, "connector": {}, "llm": {}}

    def add(part: str, path: str) -> None:
        own, names = path.rpartition(".")[2], paths.setdefault(part, {})
        taken = own in names or hasattr(Decoder, own) or hasattr(Tower, own) or own in ("model", "paths", "weights")
        names[path.replace(".", "_") if taken else own] = path

    def visit(module: nn.Module, path: str) -> None:
        for name, _ in module.named_parameters(recurse=False):
            add("connector", f"{path}{name}")
        for name, child in module.named_children():
            inside = {id(one) for one in child.modules()}
            holds_text, holds_tower = bool(inside & texts), id(tower) in inside
            if holds_text and holds_tower:
                visit(child, f"{path}{name}.")
            elif holds_text:
                add("llm", f"{path}{name}")
            elif child is tower or holds_tower:
                add("vision", f"{path}{name}")
            elif "audio" in name or "speech" in name:
                add("audio", f"{path}{name}")
            else:
                add("connector", f"{path}{name}")

    visit(whole, "")
    for name, path in list(paths["vision"].items()):
        for own, _ in whole.get_submodule(path).named_children():
            if any(word in own for word in CONNECTORS):
                add("connector", f"{paths['vision'][name]}.{own}")
    return paths


def detach_nested(whole: nn.Module, paths: Paths) -> None:
    """Let a connector inside a tower be an attribute of the tower that is not registered there: it is called as before,
    and has one name."""
    towers = tuple(f"{path}." for path in paths["vision"].values())
    for path in paths["connector"].values():
        if path.startswith(towers):
            parent, _, own = path.rpartition(".")
            holder = whole.get_submodule(parent)
            inner = getattr(holder, own)
            del holder._modules[own]
            object.__setattr__(holder, own, inner)


def _find(whole: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The outermost module whose own name is one of `names`, the first of them first."""
    found = dict(reversed([*_walk(whole)]))
    return next((found[name] for name in names if name in found), None)


def _walk(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Own names of modules, outer ones first, three levels deep."""
    level = [*module.named_children()]
    for _ in range(3):
        yield from level
        level = [pair for _, one in level for pair in one.named_children()]


def _follow(whole: nn.Module, path: str) -> Any:
    parent, _, own = path.rpartition(".")
    return getattr(whole.get_submodule(parent), own)
