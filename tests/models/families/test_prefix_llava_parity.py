"""PrefixVLM against `transformers` LLaVA: same weights, same images, same logits, loss, gradients and answers."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from tests.support.tiny_models import IMAGE, MEAN, STD, assert_close, batch_of, text_stream, tiny_vlm
from vlm_train.contracts.layout import PLACEHOLDER_ID
from vlm_train.contracts.objective import StepContext
from vlm_train.objectives.lm import LanguageModeling

IMAGE_TOKEN = 96
ROWS = {
    "single image": ([[5, *IMAGE, 6, 7, 8]], [0]),
    "several images in a row": ([[5, *IMAGE, 6, *IMAGE, 7, 8]], [0, 0]),
    "text only": ([[5, 6, 7, 8, 9]], []),
    "mixed lengths": ([[5, *IMAGE, 6, 7], [8, 9, 10, *IMAGE, 11, *IMAGE, 12, 13, 14], [3, 4]], [0, 1, 1]),
}


def reference_of(model) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=model.vision.model.config.to_dict(),
        text_config=model.llm.model.config.to_dict(),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
        image_seq_length=4,
    )
    reference = LlavaForConditionalGeneration(config)
    reference.model.vision_tower.load_state_dict(model.vision.model.state_dict())
    layers = model.connector.layers
    reference.model.multi_modal_projector.linear_1.load_state_dict(layers[0].state_dict())
    reference.model.multi_modal_projector.linear_2.load_state_dict(layers[2].state_dict())
    reference.model.language_model.load_state_dict(model.llm.model.model.state_dict())
    reference.lm_head.load_state_dict(model.llm.model.lm_head.state_dict())
    return reference


def reference_inputs(batch) -> dict:
    stream = batch.text["llm"]
    pixels = (batch.media.inputs["vision"].values.float() / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(
        STD
    ).view(1, 3, 1, 1)
    ids = torch.where(stream.ids == PLACEHOLDER_ID, IMAGE_TOKEN, stream.ids)
    images = (
        {"pixel_values": pixels[: batch.media.inputs["vision"].views_total]}
        if batch.media.inputs["vision"].views_total
        else {}
    )
    return {"input_ids": ids, "attention_mask": (stream.segment_ids != 0).long(), **images}


@pytest.mark.parametrize("name", ROWS)
def test_logits_loss_and_gradients_equal_llava(name):
    rows, items = ROWS[name]
    model = tiny_vlm()
    reference = reference_of(model)
    batch = batch_of(text_stream(rows, learn_from=1), items)
    stream, token_mask = batch.text["llm"], batch.text["llm"].segment_ids != 0

    output = reference(**reference_inputs(batch))
    assert_close(model.logits(model(batch))[token_mask], output.logits[token_mask], "logits")

    labels, weights = stream.labels.flatten(), stream.weights.sum()
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels, ignore_index=-100)
    expected.backward()
    loss = LanguageModeling(chunk=3)(model, batch, StepContext())["lm"]
    assert loss.count == weights
    (loss.sum / loss.count).backward()
    assert_close(loss.sum / loss.count, expected, "loss")

    ours = dict(model.named_parameters())
    pairs = {
        "vision.model.": reference.model.vision_tower,
        "connector.layers.0.": reference.model.multi_modal_projector.linear_1,
        "connector.layers.2.": reference.model.multi_modal_projector.linear_2,
        "llm.model.model.": reference.model.language_model,
        "llm.model.lm_head.": reference.lm_head,
    }
    compared = 0
    for prefix, module in pairs.items():
        for key, parameter in module.named_parameters():
            got, wanted = ours[prefix + key].grad, parameter.grad
            compared += 1
            if wanted is None:
                assert got is None or not got.any(), prefix + key
            elif key.endswith("k_proj.bias"):  # shifts all scores of a query alike: structurally zero
                assert got.abs().max() < 1e-7 and wanted.abs().max() < 1e-7, prefix + key
            else:
                assert_close(got, wanted, prefix + key)
    assert compared == len(ours)


@pytest.mark.parametrize("left", [False, True])
def test_generation_equals_llava(left):
    rows, items = ROWS["mixed lengths"]
    model = tiny_vlm(spread=10.0).eval()  # large enough for the last token to decide
    reference = reference_of(model).eval()
    batch = batch_of(text_stream(rows, left=left), items)
    expected = reference.generate(
        **reference_inputs(batch_of(text_stream(rows, left=True), items)),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=[],
        pad_token_id=0,
    )[:, -6:]
    assert torch.equal(model.generate(batch, max_new_tokens=6, eos_ids=[]), expected)
