"""Connectors out of the checkpoints of whole models, under the names that their releases give them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vlm_train.errors import AssetError
from vlm_train.models.weights.hub import list_tensors, read_state

Modules = dict[str, str]
"""A module of a connector -> its name in a checkpoint, below a prefix."""

PREFIXES = ("", "model.")
LLAVA = {"layers.0": "multi_modal_projector.linear_1", "layers.2": "multi_modal_projector.linear_2"}
LLAVA_OWN = {"layers.0": "mm_projector.0", "layers.2": "mm_projector.2"}
INTERNVL = {"norm": "multi_modal_projector.layer_norm", **LLAVA}
INTERNVL_OWN = {"norm": "mlp1.0", "layers.0": "mlp1.1", "layers.2": "mlp1.3"}
QWEN_VL = {"patch_norm": "visual.merger.ln_q", "layers.0": "visual.merger.mlp.0", "layers.2": "visual.merger.mlp.2"}


def load_connector(connector: Any, source: str, known: Sequence[Modules]) -> None:
    """Fill a connector from the checkpoint of a whole model, reading nothing else of it.

    Args:
        source: a hub name or a local folder with safetensors.
        known: how releases name the connector's modules; the first that is there counts.

    Raises:
        AssetError: none is there, tensors are left over, or shapes are others.
    """
    own, setting = connector.state_dict(), "connector.weights"
    listed = list_tensors(source, setting=setting)
    places = next(
        (found for names in known for prefix in PREFIXES if (found := _find(own, names, prefix, listed))), None
    )
    if places is None:
        tried = ", ".join(f"{next(iter(names.values())).rpartition('.')[0]}.*" for names in known)
        raise AssetError(
            f"{setting}: {source!r} holds no {type(connector).__name__} of these modules; looked for {tried}"
        )
    modules = {theirs.rpartition(".")[0] for theirs in places.values()}
    if more := sorted(name for name in listed - set(places.values()) if name.rpartition(".")[0] in modules):
        raise AssetError(f"{setting}: {source!r} does not fit: unexpected {', '.join(more[:3])}")
    state = read_state(source, setting=setting, wanted=set(places.values()).__contains__)
    for name, theirs in places.items():
        if state[theirs].shape != own[name].shape:
            raise AssetError(
                f"{setting}: {source!r} does not fit: {theirs} is {[*state[theirs].shape]}, the connector's "
                f"{name} {[*own[name].shape]}"
            )
    connector.load_state_dict({name: state[theirs] for name, theirs in places.items()})


def _find(own: Iterable[str], names: Modules, prefix: str, listed: set[str]) -> dict[str, str] | None:
    """Own parameter -> name in the checkpoint; None unless every module of both sides is there."""
    split = {name: name.rpartition(".")[::2] for name in own}
    if {module for module, _ in split.values()} != names.keys():
        return None
    places = {name: f"{prefix}{names[module]}.{kind}" for name, (module, kind) in split.items()}
    return places if set(places.values()) <= listed else None
