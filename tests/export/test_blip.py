"""`mode=export` of a BLIP: two folders that plain `transformers` loads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, BlipForConditionalGeneration

from tests.data.text.rendering import load
from tests.models.families.test_blip import batch, blip, pixels_of, tower
from tests.support.tiny_models import assert_close
from vlm_train.contracts.layout import NoMedia
from vlm_train.data.processor import Processor
from vlm_train.data.text.tokenizer import word_tokenizer
from vlm_train.errors import AssetError
from vlm_train.export.blip import BlipExporter, find_problems, verify_blip, write_blip
from vlm_train.export.run import write_export


def test_a_run_is_exported_for_retrieval_and_captioning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = blip(), word_tokenizer(["a cat"])
    processor = Processor(tokenizer=tokenizer, template=load("caption_bert"), layout=NoMedia())
    out = write_export(SimpleNamespace(model=model, processor=processor), tmp_path, {"blip": BlipExporter()})
    assert sorted(path.name for path in out.iterdir()) == ["captioning", "retrieval"]
    assert "one folder for retrieval and one for captioning" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(out / "retrieval").get_vocab() == tokenizer.get_vocab()
    theirs, given = BlipForConditionalGeneration.from_pretrained(out / "captioning").eval(), batch([[1, 4, 5]])
    assert theirs.config.text_config.sep_token_id == tokenizer.eos_token_id
    ids = torch.tensor([[model.llm.decoder_start, 4, 5]])
    assert_close(model.logits(model(given)), theirs(pixels_of(model, given), ids).logits)


def test_other_weights_are_not_accepted(tmp_path: Path) -> None:
    model = blip()
    write_blip(model, tmp_path)
    with torch.no_grad():
        model.llm.words.weight.add_(1.0)
    with pytest.raises(AssetError, match="is not the model's"):
        verify_blip(model, tmp_path)


def test_other_towers_have_a_problem() -> None:
    model = blip()
    assert find_problems(model) == []
    model.vision = tower(final_norm=False)
    (problem,) = find_problems(model)
    assert "blip_vision_model with its class token and final norm" in problem
