"""The files that `weights` of a part names: they say what the part says of itself, and hold what is needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vlm_train.config.architecture import CONFIG_JSON, list_contradictions
from vlm_train.config.auto import STATISTICS, list_auto, read_image_settings, side_of
from vlm_train.config.hub_files import find_local_file
from vlm_train.config.schema import MODEL_PARTS
from vlm_train.config.signatures import is_ours
from vlm_train.config.trust import iterate_components

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TENSORS = ("*.safetensors", "*.gguf")
TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.*", "spiece.model", "sentencepiece*.model", "*.tiktoken", "tekken.json",
)  # fmt: skip
"""Files of a folder that a tokenizer can be made from, whichever library wrote it."""


def check_auto(cfg: DictConfig) -> Iterator[str]:
    """Every `auto` was replaced: its part names a source."""
    for path, group, node in iterate_components(cfg):
        if group in (*MODEL_PARTS, "parts") and list_auto(node):
            yield (
                f"{path}.weights is missing: {path}=auto reads its architecture from there, "
                f"{path}.weights=<local folder or hub name>."
            )


def check_sources(cfg: DictConfig) -> Iterator[str]:
    """What a part is told about itself is what the files of its `weights` say, as far as this machine has them."""
    for path, group, node in iterate_components(cfg):
        source, numbers = node.get("weights"), node.get("config")
        if group not in MODEL_PARTS or not isinstance(source, str) or not isinstance(numbers, dict):
            continue
        if "model_type" not in numbers or find_local_file(source, CONFIG_JSON) is None:
            continue
        yield from list_contradictions(f"{path}.weights", source, numbers, side_of(group))
        told = "image_mean" in node and not _leaves_pixels(node)
        said = read_image_settings(source, f"{path}.weights", local=True) if told else None
        for key in STATISTICS if said else ():
            theirs, ours = (said or {}).get(key), node.get(key)
            if theirs and ours and any(abs(a - b) > 1e-3 for a, b in zip(theirs, ours, strict=False)):
                yield f"{path}.weights: {source!r} has {key} = {theirs}, the config says {ours}"


def _leaves_pixels(node: dict[str, Any]) -> bool:
    """Whether pixels stay in [0, 1] (mean 0, standard deviation 1), as nanoVLM trains other people's towers."""
    return not any(node.get("image_mean") or ()) and all(one == 1 for one in node.get("image_std") or ())


def describe_weightless(node: dict[str, Any]) -> str | None:
    """Why the local folder `weights` of one of our parts holds nothing that is read, or None."""
    source, target = node.get("weights"), node.get("_target_")
    folder = Path(str(source)).expanduser()
    if not isinstance(source, str) or not is_ours(str(target)) or not folder.is_dir() or _has_any(folder, TENSORS):
        return None
    if not _has_any(folder, PICKLES):
        return "holds no weights: no *.safetensors. Give the folder that has them."
    return (
        "holds pickled weights only, which can run code and are never read. Convert them once, where you trust them: "
        "transformers' from_pretrained(folder).save_pretrained(other) writes safetensors."
    )


def describe_tokenless(name: str) -> str | None:
    """Why no tokenizer can be made from a local folder, or None."""
    folder = Path(name).expanduser()
    if not folder.is_dir() or _has_any(folder, TOKENIZERS):
        return None
    return "holds no tokenizer: no tokenizer.json. Name a folder or a hub name that has one, or tokenizer=<option>."


def _has_any(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))
