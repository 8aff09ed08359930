"""Every image-text-to-text model of the pinned `transformers`, and what model=hf_vlm can do with it: the table of
docs/hf_vlm.md. `python -m tests.support.hf_vlm_registry` writes it there."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from tests.support.hf_vlm_folders import MAKERS
from vlm_train.models.families.hf_vlm import IMAGE_IDS, build_whole, find_image_id
from vlm_train.models.hf_vlm.parts import Decoder, find_paths

PAGE = Path(__file__).resolve().parents[2] / "docs/hf_vlm.md"
BEGIN, END = "<!-- table: python -m tests.support.hf_vlm_registry -->", "<!-- end of the table -->"
SMALL = {
    "hidden_size": 32, "embed_dim": 32, "d_model": 32, "intermediate_size": 64, "ffn_dim": 64, "num_hidden_layers": 2,
    "depth": 2, "num_attention_heads": 4, "num_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 320,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_intermediate_size": 16, "out_hidden_size": 32,
    "num_experts_per_tok": 2, "max_position_embeddings": 512,
}  # fmt: skip
"""Numbers of a configuration -> small ones."""


@dataclass(frozen=True)
class Row:
    """What is known of one `model_type`: `found` is the furthest that it comes, `why` what ends it there."""

    model_type: str
    kind: str
    found: str
    packs: str = ""
    why: str = ""


def list_rows() -> Iterator[Row]:
    """A row for every `model_type` of the registry, those that are trained first."""
    names = tf.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    trained = {_type_of(kind): kind for kind in MAKERS if kind != "pixtral"}
    rows = [_describe(model_type, kind, trained) for model_type, kind in names.items()]
    yield from sorted(rows, key=lambda row: (ORDER.index(row.found), row.model_type))


ORDER = ("trained", "parts found", "refused", "not built")


def _type_of(kind: str) -> str:
    return {"blip2": "blip-2"}.get(kind, kind)


def _describe(model_type: str, kind: str, trained: dict[str, str]) -> Row:
    """Build the smallest model of a type on the meta device, and look for its parts."""
    if model_type in trained:
        config = MAKERS[trained[model_type]]()[0]
    else:
        try:
            config = shrink(tf.CONFIG_MAPPING[model_type]())
        except Exception as error:  # code of any configuration
            return Row(model_type, kind, "not built", why=_first_line(error))
    try:
        find_image_id(config)
    except Exception:
        return Row(model_type, kind, "refused", why=f"its configuration names no {', '.join(IMAGE_IDS)}")
    for made, vision in ((config, "sdpa"), (config, "eager"), (None, "sdpa")):  # None: small numbers do not fit it
        try:
            made = made or tf.CONFIG_MAPPING[model_type]()
            with torch.device("meta"), contextlib.redirect_stderr(io.StringIO()):
                whole, attention = build_whole(made, "packed", vision)
            break
        except Exception as error:
            why = _first_line(error)
            if "encoder-decoder" in why:
                return Row(model_type, kind, "refused", why="an encoder-decoder")
    else:
        return Row(model_type, kind, "not built", why=why)
    try:
        paths = find_paths(whole)
        decoder = Decoder(whole, paths["llm"], None, attention == "packed")
    except Exception as error:
        return Row(model_type, kind, "refused", why=_first_line(error))
    if not all(paths[part] for part in ("vision", "connector", "llm")):
        lacks = ", ".join(part for part in ("vision", "connector", "llm") if not paths[part])
        return Row(model_type, kind, "refused", why=f"no {lacks} was found")
    packs = "yes" if decoder.takes_packed and not decoder.unmasked_mixers else "no"
    note = "model.vision_attention=eager; " if vision == "eager" else ""
    if model_type in trained:
        return Row(model_type, kind, "trained", packs, "" if packs == "yes" else _why_alone(whole, decoder))
    packs = "tried at start" if packs == "yes" else packs
    return Row(model_type, kind, "parts found", packs, f"{note}no test has a tiny processor of it")


def _why_alone(whole: Any, decoder: Decoder) -> str:
    if decoder.unmasked_mixers:
        return f"padded: {', '.join(decoder.unmasked_mixers)} carry a state along the row"
    if "cross_attention_mask" in whole.forward.__code__.co_varnames or whole.config.model_type == "mllama":
        return "padded: images are attended to row by row"
    return "padded: tokens see each other in both directions, by masks of the model's own"


def shrink(config: Any) -> Any:
    """A configuration with small numbers, those inside it too."""
    for name, value in list(vars(config).items()):
        if isinstance(value, tf.PretrainedConfig):
            shrink(value)
        elif name in SMALL and isinstance(value, int) and not isinstance(value, bool):
            setattr(config, name, SMALL[name])
    layers = getattr(config, "num_hidden_layers", None)
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list) and isinstance(layers, int):
        config.layer_types = kinds[-layers:]
    return config


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"[:160].replace("|", "/")


def write_table() -> str:
    """The table in Markdown."""
    lines = ["| model_type | class | | packed | |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {r.model_type} | {r.kind} | {r.found} | {r.packs} | {r.why} |" for r in list_rows()]
    return "\n".join(lines)


def main() -> None:
    """Put the table into the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{write_table()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
