"""From LLaVA and LLaVA-NeXT of `transformers`: every key and shape is checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from vlm_train.errors import AssetError, ConfigError
from vlm_train.export.llava import find_problems
from vlm_train.export.llava_next import find_tile_problems
from vlm_train.export.shared import embedding_name
from vlm_train.models.families.prefix_vlm import PrefixVLM
from vlm_train.models.llms.hf import HFCausalLM
from vlm_train.runs.record import read_json


class LlavaImporter:
    """Reads local folders of a `LlavaForConditionalGeneration`: config.json, safetensors and tokenizer."""

    def problems(self, folder: Path) -> list[str]:
        return find_wrong_kind(folder, ("llava",), "LlavaForConditionalGeneration")

    def adapt(self, cfg: DictConfig, folder: Path) -> None:
        read_parts_later(cfg, folder)

    def read(self, model: Any, folder: Path) -> None:
        import_llava(model, folder)


class LlavaNextImporter:
    """The same of a `LlavaNextForConditionalGeneration`. The recipe's `image` has to name its grids."""

    def problems(self, folder: Path) -> list[str]:
        return find_wrong_kind(folder, ("llava_next",), "LlavaNextForConditionalGeneration")

    def adapt(self, cfg: DictConfig, folder: Path) -> None:
        read_parts_later(cfg, folder)

    def read(self, model: Any, folder: Path) -> None:
        from transformers import LlavaNextForConditionalGeneration

        if problems := find_tile_problems(model):
            raise ConfigError(problems)
        state = read_weights(model, folder, LlavaNextForConditionalGeneration)
        model.stitcher.newline.data.copy_(state["model.image_newline"])


def find_wrong_kind(folder: Path, kinds: Sequence[str], name: str) -> list[str]:
    """Why a folder holds no model whose `model_type` is one of `kinds`; `name` is what to download."""
    path = folder / "config.json"
    if not path.is_file():
        return [f"{folder} has no config.json; download a {name} first"]
    found = read_json(path).get("model_type")
    return [] if found in kinds else [f"{path}: model_type is {found!r}; allowed: {', '.join(kinds)}"]


def read_parts_later(cfg: DictConfig, folder: Path) -> None:
    """Let the parts of a configuration be built without weights of their own; the tokenizer is that of the folder."""
    for part in ("vision", "connector", "llm"):
        if cfg[part].get("weights") is not None:
            cfg[part].weights = None
    if str(cfg.tokenizer.get("_target_")).endswith(".pretrained"):
        cfg.tokenizer.name = str(folder.absolute())
    OmegaConf.update(cfg, "llm.new_tokens", 0, force_add=True)  # its <image> and <pad> are ids that we never use


def import_llava(model: PrefixVLM, folder: str | Path) -> None:
    """Load the weights of a local `LlavaForConditionalGeneration` folder into `model`.

    Vocabulary rows beyond the model's are left out (`<image>` and padding rows).

    Raises:
        ConfigError: LLaVA has no such composition.
        AssetError: the checkpoint's parts are of another shape.
    """
    if problems := find_problems(model):
        raise ConfigError(problems)
    from transformers import LlavaForConditionalGeneration

    read_weights(model, folder, LlavaForConditionalGeneration)


def read_weights(model: PrefixVLM, folder: str | Path, kind: Any) -> dict[str, Tensor]:
    """Load the parts of a local folder of class `kind` into `model`; the whole state. Raises: see `import_llava`."""
    state = read_whole(model, folder, kind)
    try:
        model.vision.model.load_state_dict(take_prefix(state, "model.vision_tower."))
        model.connector.layers[0].load_state_dict(take_prefix(state, "model.multi_modal_projector.linear_1."))
        model.connector.layers[2].load_state_dict(take_prefix(state, "model.multi_modal_projector.linear_2."))
    except RuntimeError as error:
        raise AssetError(f"import: {str(folder)!r} does not fit the model: {error}") from error
    fill_language_model(model.llm, state, folder)
    return state


def read_whole(model: PrefixVLM, folder: str | Path, kind: Any) -> dict[str, Tensor]:
    """The weights of a local folder of class `kind`, in the type of `model`. Raises `AssetError`."""
    dtype = next(model.llm.parameters()).dtype
    try:
        whole = kind.from_pretrained(str(folder), dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise AssetError(f"import: {str(folder)!r} cannot be read as {kind.__name__}: {error}") from error
    return dict(whole.state_dict())


def fill_language_model(llm: HFCausalLM, state: Mapping[str, Tensor], folder: str | Path) -> None:
    """Copy the language model of a whole model's weights into ours. Raises `AssetError` if it does not fit."""
    embedding, body = f"{embedding_name(llm)}.", take_prefix(state, "model.language_model.")
    table = body.pop(f"{embedding}weight")
    try:
        missing, unexpected = llm.decoder.load_state_dict(body, strict=False)
    except RuntimeError as error:
        raise AssetError(f"import: {str(folder)!r} does not fit the model: {error}") from error
    if unexpected or any(not key.startswith(embedding) for key in missing):
        raise AssetError(f"import: {str(folder)!r}: missing {missing}, unexpected {unexpected}")
    _fill_rows(llm, table, state["lm_head.weight"])


@torch.no_grad()
def _fill_rows(llm: HFCausalLM, embedding: Tensor, head: Tensor) -> None:
    """Copy the first `llm.vocab_size` rows of both tables into the model."""
    if embedding.shape[0] < llm.vocab_size or embedding.shape[1] != llm.dim:
        raise AssetError(
            f"import: the checkpoint has {embedding.shape[0]} tokens of width {embedding.shape[1]}, "
            f"the model needs {llm.vocab_size} of width {llm.dim}"
        )
    inputs, outputs, base = llm.model.get_input_embeddings(), llm.model.get_output_embeddings(), llm.base_vocab_size
    for module, table, new in ((inputs, embedding, "new_embeddings"), (outputs, head, "new_head")):
        module.weight.copy_(table[:base])
        if llm.new_tokens:
            getattr(module, new).copy_(table[base : llm.vocab_size])


def take_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
