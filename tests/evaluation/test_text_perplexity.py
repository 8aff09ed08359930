"""Perplexity of texts: equal to a plain computation; and what a run found before its first step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from data_pipelines.shards.shard_set import ShardSet
from tests.support.small_run import command, make_data, train
from vlm_train.build import build_assembly
from vlm_train.config.compose import compose_config
from vlm_train.data.collate import Example, collate_rows
from vlm_train.errors import ConfigError
from vlm_train.evaluation.text_perplexity import TextPerplexity
from vlm_train.report import results_table


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("texts"), text_only=True)


def test_it_is_the_exponential_of_the_mean_loss(data: Path, tmp_path: Path) -> None:
    assembly = build_assembly(compose_config(command(data, tmp_path)))
    model, processor = assembly.model.train(), assembly.processor
    shards = ShardSet(data / "tiny/train")
    loss = hits = tokens = 0.0
    for sample, _ in shards:
        if sample.media:
            continue
        batch = collate_rows([[Example(processor.render(sample), {"vision": []})]], processor.images)
        stream, index = batch.text["llm"], batch.text["llm"].supervised
        with torch.no_grad():
            logits = model.eval().logits(model(batch)).flatten(0, 1)[index]
        labels = stream.labels.flatten()[index]
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        hits, tokens = hits + int((logits.argmax(-1) == labels).sum()), tokens + len(labels)
    model.train()
    for size in (1, 4, 16):
        evaluator = TextPerplexity(shards=str(data / "tiny/train"), batch=size)
        found = evaluator.run(model, processor, tmp_path, final=True)
        assert found.metrics["perplexity"] == pytest.approx(torch.tensor(loss / tokens).exp().item(), rel=1e-5)
        assert found.metrics["token_accuracy"] == pytest.approx(hits / tokens)
        assert [(row.metric, row.n) for row in found.rows] == [("perplexity", tokens), ("token_accuracy", tokens)]
        assert "6 samples unusable" in found.rows[0].note and model.training


def test_it_needs_texts(data: Path, tmp_path: Path) -> None:
    assembly = build_assembly(compose_config(command(data, tmp_path)))
    with pytest.raises(ConfigError, match="none of the 1 samples"):
        TextPerplexity(shards=str(data / "tiny/train"), limit=1).run(
            assembly.model, assembly.processor, tmp_path, final=False
        )
    with pytest.raises(ConfigError, match="batch=0, limit=None; allowed: from 1"):
        TextPerplexity(shards="x", batch=0)


def test_a_run_says_what_it_began_with(data: Path, tmp_path: Path) -> None:
    texts = ["eval=text_perplexity", f"eval.text.shards={data}/tiny/train", "trainer.export=false"]
    before = train(command(data, tmp_path, *texts, "trainer.evaluate_first=true", name="before"))
    plain = train(command(data, tmp_path, *texts, name="plain"))
    ends = [load_file(run / "checkpoints/step-00000006/weights.safetensors") for run in (plain, before)]
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())  # it changes nothing
    rows = [json.loads(line) for line in (before / "metrics.jsonl").read_text().splitlines()]
    (first,) = [row for row in rows if row["split"] == "before"]
    (last,) = [row for row in rows if row["split"] == "test"]
    assert first["step"] == 0 and first["text/perplexity"] > last["text/perplexity"]  # it learned
    results = json.loads((before / "run.json").read_text())["results"]
    assert [(row["name"], row["metric"]) for row in results] == [
        (name, metric) for metric in ("perplexity", "token_accuracy") for name in ("this run", "before this run")
    ]
    assert results[1]["value"] == first["text/perplexity"]
    assert "before this run" in results_table(before) and "before this run" not in results_table(plain)
