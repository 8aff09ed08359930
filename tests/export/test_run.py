"""Writing `<run>/export`: complete and verified, or the earlier one stays."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoProcessor

from tests.data.text.rendering import load
from tests.support.tiny_models import tiny_llm, tiny_vision
from vlm_train.build import build_assembly, build_exporters
from vlm_train.config.compose import compose_config
from vlm_train.contracts.layout import GridLayout
from vlm_train.data.images.transform import ImageTransform
from vlm_train.data.processor import Processor
from vlm_train.data.text.tokenizer import byte_level
from vlm_train.errors import AssetError
from vlm_train.export.llava import LlavaExporter
from vlm_train.export.run import replace_folder, write_export
from vlm_train.models.connectors.mlp import MLP
from vlm_train.models.families.prefix_vlm import PrefixVLM

LLAVA = {"llava": LlavaExporter()}


def built(template: str = "vicuna_v1") -> SimpleNamespace:
    torch.manual_seed(0)
    tokenizer = byte_level()
    config = {"model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32}
    vision, llm = tiny_vision(), tiny_llm(config | {"num_hidden_layers": 1, "num_attention_heads": 2})
    model = PrefixVLM(vision=vision, connector=MLP(in_dim=vision.out_dim, out_dim=llm.dim), llm=llm)
    image = ImageTransform(mode="pad", size=(32, 32), patch_grid=vision.patch_grid)
    layout = GridLayout(image.grids, model.connector.token_grid)
    processor = Processor(tokenizer=tokenizer, template=load(template), layout=layout, images={"vision": image})
    return SimpleNamespace(model=model, processor=processor)


def test_export_carries_the_template_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = write_export(built(), tmp_path, LLAVA)
    assert "it has a chat template that gives the prompts of training" in capsys.readouterr().out
    processor = AutoProcessor.from_pretrained(out)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    assert text.startswith("<bos>A chat between") and text.endswith("USER: <image>\nWhat color? ASSISTANT:")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize(
    "recipe", ["blip2_stage1", "blip2_stage2_opt", "blip2_stage2_flant5", "instructblip_vicuna7b", "minigpt4_stage1"]
)
def test_models_with_a_q_former_are_exported_from_their_runs(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = build_assembly(compose_config([f"recipe={recipe}", "size=tiny", "init_from=[]"]))
    processor = AutoProcessor.from_pretrained(write_export(made, tmp_path, build_exporters(made.cfg)))
    assert "(blip2); what it computes equals the run's; it has no chat template: " in capsys.readouterr().out
    assert processor.num_query_tokens == 4
    bos = processor.tokenizer("a")["input_ids"][0] == processor.tokenizer.bos_token_id
    assert bos == (recipe in ("blip2_stage2_opt", "minigpt4_stage1")), "where training has it"


def test_a_failed_export_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write_export(built(), tmp_path, LLAVA)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def refuse(*_: object) -> None:
        raise AssetError("export: logits differ")

    monkeypatch.setattr(LlavaExporter, "verify", refuse)
    with pytest.raises(AssetError):
        write_export(built("qa"), tmp_path, LLAVA)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_kill_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "export.old").mkdir()
    (tmp_path / "export.old" / "kept").touch()
    with pytest.raises(RuntimeError), replace_folder(tmp_path / "export"):
        raise RuntimeError
    assert (tmp_path / "export" / "kept").exists()
    with replace_folder(tmp_path / "export") as partial:
        (partial / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["export", "new"]
