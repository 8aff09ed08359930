"""Parts and layers are found by what a model holds, not by names."""

from __future__ import annotations

from torch import nn

from vlm_train.contracts.model_parts import find_encoders, find_layers, find_parts, name_part


class Tower(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(depth))


class Mixture(nn.Module):
    """Two encoders, a part that no configuration group is called after, and a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.ModuleDict({"clip": Tower(2), "dino": Tower(1)})
        self.router = nn.Linear(2, 2)
        self.llm = Tower(1)
        self.scale = nn.Parameter(nn.Linear(1, 1).weight)


def test_members_of_a_part_are_parts() -> None:
    model = Mixture()
    assert list(find_parts(model)) == ["vision.clip", "vision.dino", "router", "llm"]
    assert list(find_layers(model)) == ["vision.clip.0", "vision.clip.1", "vision.dino.0", "llm.0"]
    assert find_layers(model)["vision.dino.0"] is model.vision["dino"].layers[0]
    assert list(find_encoders(model)) == ["clip", "dino"]
    assert find_encoders(model.llm) == {}
    model.vision = model.vision["clip"]
    assert list(find_encoders(model)) == ["vision"] and list(find_parts(model)) == ["vision", "router", "llm"]


def test_a_parameter_belongs_to_the_longest_part() -> None:
    model = Mixture()
    owners = {name: name_part(name, find_parts(model)) for name, _ in model.named_parameters()}
    assert owners["vision.clip.layers.0.weight"] == "vision.clip"
    assert owners["vision.dino.layers.0.bias"] == "vision.dino"
    assert owners["router.weight"] == "router" and owners["scale"] == "scale"
