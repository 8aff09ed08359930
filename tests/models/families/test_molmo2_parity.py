"""Molmo2 from a sample to its loss against Molmo2 of `transformers`: same weights, same pictures, same logits, loss,
gradients and answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipelines.media.limits import media_item
from data_pipelines.sample import Annotation, Media, Sample, Text, Turn
from tests.support.parity import encode, noise
from tests.support.tiny_models import assert_close
from tests.support.videos import video
from vlm_train.build import Assembly, build_assembly
from vlm_train.config.compose import compose_tiny
from vlm_train.contracts.batch import Batch
from vlm_train.contracts.layout import PLACEHOLDER_ID
from vlm_train.contracts.media import Features, Grid3
from vlm_train.contracts.objective import StepContext
from vlm_train.data.collate import Example, collate_prompts, collate_rows
from vlm_train.data.text.render import RenderOptions
from vlm_train.models.connectors.attention_pool import AttentionPool, find_view_cells
from vlm_train.objectives.lm import LanguageModeling

theirs: Any = pytest.importorskip("transformers.models.molmo2.modeling_molmo2")
configs: Any = pytest.importorskip("transformers.models.molmo2.configuration_molmo2")
MARKS = ("<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>", "<im_end>", "<frame_end>")

SHOWN: dict[str, list[list[tuple[int, int] | str]]] = {
    "one image": [[(90, 60)]],
    "one tile": [[(20, 30)]],
    "a thin line": [[(300, 5)]],
    "several images": [[(64, 32), (33, 190)]],
    "text only": [[]],
    "mixed": [[(90, 60)], [(20, 170), (64, 64)], []],
    "videos": [["video"], ["video"], []],
}


def make_assembly(layers: float) -> Assembly:
    """With weights large enough for images to matter; those of the language model's layers `layers` times as large.

    Twice as large in the tower, rounding grows from 3e-6 to 1e-5 of a gradient, and with three times to 1e-4.
    """
    found = build_assembly(compose_tiny("recipe=molmo2_4b_pretrain", "llm.response_residual_dropout=0"))
    with torch.no_grad():
        for name, parameter in found.model.named_parameters():
            if parameter.ndim > 1 or name == "connector.offset":
                parameter.mul_(3.0 if name.startswith("connector.") else layers if ".model.layers." in name else 1.5)
    TOKENS.update({one: found.processor.tokenizer.convert_tokens_to_ids(one) for one in MARKS})
    assert TOKENS["<im_patch>"] == PATCH
    return found


@pytest.fixture(scope="module")
def assembly() -> Assembly:
    return make_assembly(2.0)


def make_example(assembly: Assembly, media: list[tuple[int, int] | str], **options: Any) -> Example:
    blobs = [video(3, (64, 48)) if isinstance(one, str) else encode(noise(*one)) for one in media]
    items = tuple(media_item(place, blob) for place, blob in enumerate(blobs))
    ask = Turn(role="user", parts=(*(Media(item=place) for place in range(len(blobs))), Text(text="What?")))
    answer = Turn(role="assistant", parts=(Text(text=f"It shows {len(blobs)}."),))
    sample = Sample(key="one", media=items, annotations=(Annotation(turns=(ask, answer)),))
    rendered = assembly.processor.render(sample, RenderOptions(**options))
    return Example(rendered, assembly.processor.make_views(blobs, media=items))


def make_reference(model: Any) -> Any:
    """Their model with our weights. Its table of embeddings holds ours, the new rows and the image token's."""
    vision, text, pool = model.vision.model.config, model.llm.model.config, model.connector
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    numbers = {name: getattr(vision, name) for name in same}
    heads = vision.num_attention_heads
    tower = configs.Molmo2VisionConfig(
        **numbers, num_key_value_heads=heads, head_dim=vision.hidden_size // heads, patch_size=vision.patch_size,
        image_size=[vision.image_size] * 2, layer_norm_eps=vision.layer_norm_eps,
    )  # fmt: skip
    adapter = configs.Molmo2AdapterConfig(
        vision_feature_layer=[-1, -2], hidden_size=vision.hidden_size, num_attention_heads=pool.num_heads,
        num_key_value_heads=pool.num_heads, head_dim=vision.hidden_size // pool.num_heads,
        intermediate_size=pool.gate.out_features, text_hidden_size=model.llm.dim,
    )  # fmt: skip
    same = (*same, "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps", "rope_parameters")
    language = configs.Molmo2TextConfig(
        **{name: getattr(text, name) for name in same}, additional_vocab_size=model.llm.new_tokens
    )
    config = configs.Molmo2Config(
        vision_config=tower, adapter_config=adapter, text_config=language, image_patch_id=PATCH
    )
    config._attn_implementation = "eager"
    reference = theirs.Molmo2ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(to_theirs(name, {**dict(model.named_parameters()), "offset": model.connector.offset}))
    return reference.train()


PATCH = 273
"""<im_patch> under `size=tiny`: the first new row, which ours does not read: `connector.offset` takes its place."""
NAMES = {
    "model.multi_modal_projector.image_pooling_2d.q_proj": "connector.query",
    "model.multi_modal_projector.image_pooling_2d.k_proj": "connector.key",
    "model.multi_modal_projector.image_pooling_2d.v_proj": "connector.value",
    "model.multi_modal_projector.image_pooling_2d.o_proj": "connector.output",
    "model.multi_modal_projector.image_projector.gate_proj": "connector.gate",
    "model.multi_modal_projector.image_projector.up_proj": "connector.up",
    "model.multi_modal_projector.image_projector.down_proj": "connector.down",
    "model.vision_tower.patch_embedding": "vision.model.embeddings.patch_embedding",
    "model.vision_tower.positional_embedding": "vision.model.embeddings.position_embedding.weight",
    "model.vision_tower.layers": "vision.model.encoder.layers",
    "o_proj": "out_proj",
    "model.language_model": "llm.model.model",
}


def to_theirs(name: str, ours: dict[str, Any]) -> Tensor:
    """What we hold (or its gradients) for a parameter of theirs."""
    table = "llm.model.model.embed_tokens."
    if name == "lm_head.weight":
        return ours[f"{table}base.weight"]
    if name == "model.language_model.embed_tokens.weight":
        new = ours[f"{table}new_embeddings"].clone()
        new[PATCH - 273] = ours["offset"]
        return torch.cat([ours[f"{table}base.weight"], new])
    own = name
    for one, other in NAMES.items():
        if not (one == "o_proj" and "vision_tower" not in name):
            own = own.replace(one, other)
    value = ours[own]
    return value.permute(0, 2, 3, 1).flatten(1) if "patch_embedding.weight" in own else value


def reference_inputs(model: Any, batch: Batch) -> dict[str, Any]:
    """Pixels as their processor cuts them into patches, the patches of every token, and which tokens see each other by
    the ids alone."""
    stream, shown = batch.text["llm"], batch.media.inputs["vision"]
    ids = stream.ids.masked_fill(stream.ids == PLACEHOLDER_ID, PATCH)
    mark_ids = torch.tensor([TOKENS[one] for one in MARKS])
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": (stream.segment_ids != 0).long(),
        "mm_token_type_ids": torch.isin(ids, mark_ids).long(),
    }
    if not shown.views_total:
        return inputs
    pixels = (shown.values.float() / 255 - 0.5) / 0.5
    side, patch = pixels.shape[-1], model.vision.model.config.patch_size
    rows = pixels.unflatten(2, (side // patch, patch)).unflatten(4, (side // patch, patch))
    patches = rows.permute(0, 2, 4, 3, 5, 1).flatten(1, 2).flatten(2)
    places, grids, first = [], [], 0
    for shape, count in zip(shown.shapes, shown.view_counts, strict=True):
        whole = Grid3(1, side // patch, side // patch)
        if shape.frames:
            cells = find_view_cells(whole, 3)
            for frame in range(count):
                places.append(pad_cells(cells, first + frame * whole.size))
            grids.append([count, -(-whole.h // 3), -(-whole.w // 3)])
        else:
            numbers = canvas_numbers(shape, whole)
            for table in (torch.arange(whole.size), numbers + whole.size):
                grid = whole if len(table) == whole.size and len(places) % 2 == 0 else shape.join_grid(whole)
                cells = torch.from_numpy(find_view_cells(grid, 2))
                places.append(torch.where(cells < 0, -1, table[cells.clamp(min=0)] + first))
            image = shape.join_grid(whole)
            grids.append([whole.h // 2, whole.w // 2, -(-image.h // 2), -(-image.w // 2)])
        first += count * whole.size
    kind = "video" if shown.shapes[0].frames else "image"
    values = "pixel_values_videos" if kind == "video" else "pixel_values"
    return inputs | {
        values: patches, f"{kind}_token_pooling": torch.cat(places), f"{kind}_grids": torch.tensor(grids)
    }  # fmt: skip


TOKENS: dict[str, int] = {}


def pad_cells(cells: Any, first: int) -> Tensor:
    found = torch.from_numpy(cells)
    return torch.where(found < 0, -1, found + first)


def canvas_numbers(shape: Any, tile: Grid3) -> Tensor:
    """Which patch of the tiles each patch of the joined image is: `_build_overlapping_crops` of their processor."""
    left, right = shape.margins
    numbers = torch.arange(shape.rows * shape.columns * tile.size).view(shape.rows, shape.columns, tile.h, tile.w)
    numbers[1:, :, :left] = -1
    numbers[:, 1:, :, :left] = -1
    numbers[:-1, :, -right:] = -1
    numbers[:, :-1, :, -right:] = -1
    flat = numbers.permute(0, 2, 1, 3).reshape(-1)
    return flat[flat >= 0]


@pytest.mark.parametrize("name", SHOWN)
def test_logits_loss_and_gradients_equal_transformers(assembly: Assembly, name: str) -> None:
    model = assembly.model
    batch = collate_rows([[make_example(assembly, media)] for media in SHOWN[name]], assembly.processor.images)
    reference = make_reference(model)
    stream, seen = batch.text["llm"], batch.text["llm"].segment_ids != 0
    logits = reference(**reference_inputs(model, batch)).logits
    model.zero_grad()
    assert_close(model.logits(model(batch))[seen], logits[seen], "logits")
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), stream.labels.flatten(), ignore_index=-100)
    expected.backward()
    loss = LanguageModeling()(model, batch, StepContext())["lm"]
    (loss.sum / loss.count).backward()
    assert_close(loss.sum / loss.count, expected, "loss")
    compare_gradients(model, reference, has_media=bool(batch.media.slot_counts))


@pytest.mark.parametrize("grids", [[Grid3(1, 7, 9), Grid3(1, 4, 4), Grid3(1, 7, 9)], [Grid3(1, 27, 46)]])
def test_connector_equals_their_adapter(grids: list[Grid3]) -> None:
    """Outputs and gradients, images and frames in one batch."""
    torch.manual_seed(0)
    own = AttentionPool(in_dim=32, out_dim=24, hidden_size=16, num_heads=4, intermediate_size=40, init_std=0.3)
    config = configs.Molmo2AdapterConfig(
        vision_feature_layer=[-1, -2], hidden_size=16, num_attention_heads=4, num_key_value_heads=4, head_dim=4,
        intermediate_size=40, text_hidden_size=24,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    adapter = theirs.Molmo2Adapter(config)
    prefix, weights = "model.multi_modal_projector.", {f"connector.{key}": one for key, one in own.named_parameters()}
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter.copy_(to_theirs(prefix + name, weights))
    values = torch.randn(sum(grid.size for grid in grids), 32)
    inputs = [values.clone().requires_grad_() for _ in range(2)]
    frames = [number == 1 for number in range(len(grids))]
    cells, first = [], 0
    for grid, frame in zip(grids, frames, strict=True):
        of_view = pad_cells(find_view_cells(grid, 3 if frame else 2), first)
        cells.append(torch.nn.functional.pad(of_view, (0, 9 - of_view.shape[1]), value=-1))
        first += grid.size
    found = own(Features(inputs[0], tuple(grids)), frames)
    expected = adapter(inputs[1][None], torch.cat(cells)).last_hidden_state + own.offset.detach()
    assert [grid.size for grid in found.grids] == list(map(len, cells))
    assert_close(found.values, expected, "tokens")
    for one in (found.values, expected):
        (one * torch.linspace(-1, 1, 24)).square().sum().backward()
    assert_close(inputs[0].grad, inputs[1].grad, "patches")
    gradients = {f"connector.{key}": one.grad for key, one in own.named_parameters()}
    for name, parameter in adapter.named_parameters():
        if not name.endswith("k_proj.bias"):  # a key's bias has no gradient
            assert_close(to_theirs(prefix + name, gradients), parameter.grad, name)


def compare_gradients(model: Any, reference: Any, *, has_media: bool) -> None:
    zeros = {name: torch.zeros_like(one) for name, one in model.named_parameters()}
    found = {name: zeros[name] if one.grad is None else one.grad for name, one in model.named_parameters()}
    found["offset"] = found["connector.offset"]
    head = reference.lm_head.weight.grad
    largest = max(float(one.abs().max()) for name, one in found.items() if not name.startswith("llm."))
    for name, parameter in reference.named_parameters():
        if name == "lm_head.weight":
            continue  # ours is the table of embeddings, whose gradients are added below
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if name == "model.language_model.embed_tokens.weight":
            wanted = wanted.clone()
            wanted[: len(head)] += head
        got = to_theirs(name, found)
        media = "language_model" not in name
        if (media and not has_media) or name.endswith("k_proj.bias"):  # a key's bias has no gradient
            assert got.abs().max() < 1e-6 and wanted.abs().max() < 1e-6, name
        elif media and (".q_proj." in name or ".k_proj." in name):
            assert (got - wanted).abs().max() <= 1e-5 * largest, name  # nearly uniform attention: hardly a gradient
        else:
            assert_close(got, wanted, name)


def test_generation_equals_transformers() -> None:
    """With weights with which causal prompts would be continued otherwise."""
    assembly = make_assembly(10.0)
    model, plans = assembly.model.eval(), assembly.processor.images
    prompts = [make_example(assembly, media, generation=True) for media in SHOWN["mixed"]]
    batch = collate_prompts([(one.rendered, one.views) for one in prompts], plans)
    reference = make_reference(model).eval()
    expected = reference.generate(
        **reference_inputs(model, batch), max_new_tokens=6, do_sample=False, eos_token_id=[], pad_token_id=0
    )[:, -6:]
    assert torch.equal(model.generate(batch, max_new_tokens=6, eos_ids=[]), expected)
    causal = replace(batch, text={"llm": replace(batch.text["llm"], masked=None)})
    assert not torch.equal(model.generate(causal, max_new_tokens=6, eos_ids=[]), expected)
    assert model.generate(batch, max_new_tokens=3, eos_ids=[], num_beams=2).shape == (3, 3)
