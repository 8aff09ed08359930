"""The parts of a model and their layers, by name: nobody else has to know which parts a family is wired from."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def find_parts(model: nn.Module) -> dict[str, nn.Module]:
    """Dotted name -> part: every module that the family holds, and every member of a part that is a mapping of several
    (`vision.clip`, `vision.dino`)."""
    found: dict[str, nn.Module] = {}
    for name, part in model.named_children():
        if isinstance(part, nn.ModuleDict):
            found |= {f"{name}.{inner}": member for inner, member in part.items()}
        else:
            found[name] = part
    return found


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """`<part>.<number>` -> layer: the numbered layers that parts offer as their `layers`. A list of modules, such as
    blocks inserted into a language model, is its own layers."""
    found: dict[str, nn.Module] = {}
    for name, part in find_parts(model).items():
        layers = part if isinstance(part, nn.ModuleList) else getattr(part, "layers", None)
        if isinstance(layers, nn.ModuleList):
            found |= {f"{name}.{number}": layer for number, layer in enumerate(layers)}
    return found


def find_encoders(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> vision encoder: "vision" where the model has one, their own names where it has several, none without."""
    vision = getattr(model, "vision", None)
    if isinstance(vision, nn.ModuleDict):
        return dict(vision.items())
    return {} if vision is None else {"vision": vision}


def name_part(parameter: str, parts: Iterable[str]) -> str:
    """The part of `parts` that a parameter belongs to, by its full name; its first word if it is the family's own."""
    inside = (part for part in parts if parameter.startswith(f"{part}."))
    return max(inside, key=len, default=parameter.split(".", 1)[0])
