"""Losses and gradients of BLIP-2's stage 1 and of BLIP's pre-training against those of the published code.

`golden/` holds what `blip2_qformer.py` of github.com/salesforce/LAVIS (506965b) and `blip_pretrain.py` of
github.com/salesforce/BLIP (056a169) computed on made inputs, in fp32 on a CPU: the tower's features and captions, the
weights, and the losses with their gradients. ITM took the likeliest negatives there, as the noise is switched off here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support.tiny_models import assert_close, batch_of, text_stream
from vlm_train.build import build_objectives
from vlm_train.config.compose import compose_config
from vlm_train.contracts.batch import Batch
from vlm_train.contracts.objective import StepContext
from vlm_train.models.connectors.qformer import QFormerConnector
from vlm_train.models.families.blip import Blip
from vlm_train.models.families.blip2_qformer import Blip2QFormerModel
from vlm_train.models.llms.blip_text import BlipTextModel
from vlm_train.models.weights.blip_names import CAPTIONING, RETRIEVAL, name_modules
from vlm_train.models.weights.qformer_names import our_name
from vlm_train.objectives.itm import ITM

GOLDEN = Path(__file__).parent / "golden"
LAVIS_HEADS = {
    "vision_proj": "image_projection",
    "text_proj": "text_projection",
    "itm_head": "match_head",
    "Qformer.cls.predictions.transform.dense": "lm_head.0",
    "Qformer.cls.predictions.transform.LayerNorm": "lm_head.2",
}


class Tower(nn.Module):
    """Stands for the vision tower, whose features are given."""

    keep_cls = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_dim = width


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(GOLDEN / f"{name}.safetensors"), json.loads((GOLDEN / f"{name}.json").read_text())


def captions(tensors: dict[str, Tensor]) -> Batch:
    ids, real = tensors["batch.ids"], tensors["batch.att"].bool()
    rows = [row[mask].tolist() for row, mask in zip(ids, real, strict=True)]
    return batch_of(text_stream(rows), list(range(len(rows))), tokens=0)


def lavis_name(name: str) -> str | None:
    """A parameter of LAVIS' model under our name; None: a buffer, or tied to another."""
    if name in ("temp", "Qformer.cls.predictions.bias"):
        return {"temp": "temperature"}.get(name, "lm_bias")
    head, _, kind = name.rpartition(".")
    if head in LAVIS_HEADS:
        return f"{LAVIS_HEADS[head]}.{kind}"
    name = name.replace("Qformer.bert.embeddings.LayerNorm", "qformer.layernorm")
    name = name.replace("Qformer.bert.embeddings", "embeddings").replace("Qformer.bert.", "qformer.")
    found = our_name(name.replace("attention.self.", "attention.attention."))
    return found and f"connector.{found}"


@pytest.fixture
def likeliest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ITM, "_draw_noise", lambda *_: (torch.zeros(()), torch.zeros(())))


def losses(recipe: str, model: Any, batch: Batch) -> dict[str, Tensor]:
    """The mean losses of a recipe's objectives as one process computes them."""
    objectives = build_objectives(compose_config([f"recipe={recipe}"]))
    made = [objective(model, batch, StepContext()) for objective in objectives.values()]
    return {name: loss.sum / loss.count * loss.weight for one in made for name, loss in one.items()}


@pytest.mark.usefixtures("likeliest")
def test_blip2_stage1_has_the_losses_and_gradients_of_lavis() -> None:
    tensors, facts = golden("blip2_stage1")
    words, width, layers, heads, ffn, vision, queries, shared = facts["dims"]
    connector = QFormerConnector(
        in_dim=vision, out_dim=None, text=True, vocab_size=words, num_query_tokens=queries, hidden_size=width,
        num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=ffn, max_positions=40, dropout=0.1,
    )  # fmt: skip
    model = Blip2QFormerModel(
        vision=Tower(vision), connector=connector, embed_dim=shared, start_id=facts["start"]
    ).eval()
    model._encode_images = lambda batch: tensors["batch.image"].double()  # type: ignore[method-assign]
    theirs = {n.removeprefix("weights."): t for n, t in tensors.items() if n.startswith("weights.")}
    named = {own: tensor for name, tensor in theirs.items() if (own := lavis_name(name)) is not None}
    named["connector.qformer.queries"] = named["connector.qformer.queries"][0]
    model.load_state_dict(named, strict=True)
    model.double()  # in fp32 each machine rounds sums otherwise, and some gradients cancel; so did those of LAVIS
    found = losses("blip2_stage1", model, captions(tensors))
    expected = {"itc": "loss_itc", "itm": "loss_itm", "itg": "loss_lm"}
    for ours, other in expected.items():
        assert found[ours].item() == pytest.approx(facts["losses"][other], rel=2e-6), ours
    total = torch.stack([loss.double() for loss in found.values()]).sum()
    total.backward()
    gradients = {lavis_name(n.removeprefix("gradients.")): t for n, t in tensors.items() if n.startswith("gradients.")}
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == own.keys() and len(own) > 100
    largest = max(tensor.abs().max() for tensor in gradients.values())
    for name, gradient in own.items():
        other = gradients[name].reshape(gradient.shape)
        if other.abs().max() > 1e-6 * largest:  # keys' biases have none
            # The distance of LAVIS's fp32 from the exact value: at most 5.4e-5, and 2.9e-3 for a sum over like queries
            # that comes to a thousandth of them.
            cancels = name.startswith("image_projection.")
            assert_close(gradient, other.double(), name, tolerance=4e-3 if cancels else 1e-4)


@torch.no_grad()
@pytest.mark.usefixtures("likeliest")
def test_blip_has_the_losses_of_its_published_code() -> None:
    """Its ITC without the queue and the soft targets, which we do not have."""
    tensors, facts = golden("blip_pretrain")
    words, width, layers, heads, ffn, vision, shared = facts["dims"]
    sizes = {"vocab_size": words, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"intermediate_size": ffn, "max_position_embeddings": 40}
    model = Blip(vision=Tower(vision), llm=BlipTextModel(config=sizes), embed_dim=shared).eval()
    model._encode_pixels = lambda batch: tensors["batch.image"]  # type: ignore[method-assign]
    own = model.state_dict()
    for ours, theirs in (name_modules(RETRIEVAL, layers) | name_modules(CAPTIONING, layers)).items():
        for kind in {"weight", "bias"}.intersection(n.rpartition(".")[2] for n in own if n.startswith(f"{ours}.")):
            own[f"{ours}.{kind}"].copy_(tensors[f"weights.{theirs}.{kind}"])
    own["llm.head_bias"].copy_(tensors["weights.text_decoder.cls.predictions.bias"])
    own["temperature"].copy_(tensors["weights.temp"])
    found = losses("blip_base", model, captions(tensors))
    assert {name: loss.item() for name, loss in found.items()} == pytest.approx(facts["losses"], rel=2e-6)
