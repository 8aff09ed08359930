"""An interleaved document, media inside a learned turn, is learned in its order."""

from __future__ import annotations

from data_pipelines.sample import Media, Text, Turn
from tests.data.text.rendering import layout, load, sample
from tests.support.render import render_sample
from vlm_train.contracts.layout import PLACEHOLDER_ID
from vlm_train.data.show import learned_tokens
from vlm_train.data.text.tokenizer import byte_level

PARTS = (Text(text="One. "), Media(item=0), Text(text="Two."), Media(item=1), Text(text="Three."))


def test_a_document_is_learned_in_its_order():
    tokenizer = byte_level()
    document = sample((Turn(role="assistant", parts=PARTS),), media=2)
    stream = render_sample(document, load("interleaved"), tokenizer, layout).llm
    assert [(placed.slot.item, placed.slot.count) for placed in stream.slots] == [(0, 3), (1, 4)]
    shown = "".join("#" if token == PLACEHOLDER_ID else tokenizer.decode([token]) for token in stream.ids.tolist())
    assert shown.endswith("One. ###Two.####Three.<eos>")
    text = stream.ids[learned_tokens(stream)]
    assert tokenizer.decode(text.tolist()) == "One. Two.Three.<eos>"  # with what follows an image
