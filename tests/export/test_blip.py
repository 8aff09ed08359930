"""`mode=export` of a BLIP: two folders that plain `transformers` loads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, BlipForConditionalGeneration

from tests.models.test_blip import batch, blip, pixels_of, tower
from tests.tiny_models import assert_close
from vlm_train.data.tokenizer import words
from vlm_train.errors import ConfigError
from vlm_train.export.run import write_export


def test_a_run_is_exported_for_retrieval_and_captioning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = blip(), words(["a cat"])
    out = write_export(SimpleNamespace(model=model, tokenizer=tokenizer, image=None), tmp_path)
    assert sorted(path.name for path in out.iterdir()) == ["captioning", "retrieval"]
    assert "for retrieval and for captioning" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(out / "retrieval").get_vocab() == tokenizer.get_vocab()
    theirs, given = BlipForConditionalGeneration.from_pretrained(out / "captioning").eval(), batch([[1, 4, 5]])
    assert theirs.config.text_config.sep_token_id == tokenizer.eos_token_id
    ids = torch.tensor([[model.llm.decoder_start, 4, 5]])
    assert_close(model.logits(model(given)), theirs(pixels_of(model, given), ids).logits)


def test_other_towers_are_refused(tmp_path: Path) -> None:
    model = blip()
    model.vision = tower(final_norm=False)
    with pytest.raises(ConfigError, match="blip_vision_model with its class token and final norm"):
        write_export(SimpleNamespace(model=model, tokenizer=words(["a"]), image=None), tmp_path)
    assert list(tmp_path.iterdir()) == []
