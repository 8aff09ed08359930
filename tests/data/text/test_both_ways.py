"""Media that see each other in both directions: their tokens and marks are one block of the shared prefix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_pipelines.errors import BadSample
from data_pipelines.sample import Annotation, Media, MediaItem, Sample, Text, Turn
from vlm_train.build import Assembly, build_assembly
from vlm_train.config.compose import compose_tiny
from vlm_train.contracts.batch import IGNORE
from vlm_train.contracts.layout import PLACEHOLDER_ID
from vlm_train.data.text.render import RenderOptions
from vlm_train.models.layers.masks import attention_mask


@pytest.fixture(scope="module")
def molmo2() -> Assembly:
    return build_assembly(compose_tiny("recipe=molmo2_4b_pretrain"), meta=True)


def annotation(question: str, answer: str, *items: int) -> Annotation:
    ask = Turn(role="user", parts=(*(Media(item=item) for item in items), Text(text=question)))
    return Annotation(turns=(ask, Turn(role="assistant", parts=(Text(text=answer),))))


def sample(*annotations: Annotation, count: int = 1) -> Sample:
    media = tuple(MediaItem(name=f"{number}.png", width=40, height=40) for number in range(count))
    return Sample(key="one", media=media, annotations=annotations)


def test_annotations_share_the_block_and_do_not_see_each_other(molmo2: Assembly) -> None:
    """Message trees, as `InterleavedTextPreprocessor.tokenize_message_list` of github.com/allenai/molmo2."""
    told = sample(annotation("What?", "A cat <im_col>.", 0), annotation("Where?", "Here.", 0))
    stream = molmo2.processor.render(told, RenderOptions(annotations="independent")).llm
    groups, tokenizer = stream.attention_group, molmo2.processor.tokenizer
    assert groups[0] == 0 and stream.ids[0] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    block = np.flatnonzero(groups == -1)
    end = int(block[-1]) + 1
    assert np.array_equal(block, np.arange(1, end)) and (stream.ids == PLACEHOLDER_ID).sum() == 50
    assert sorted(set(groups[end:].tolist())) == [1, 2], "a mark that an answer spells is plain text"
    starts = [int(np.flatnonzero(groups == group)[0]) for group in (1, 2)]
    assert stream.positions[0, starts].tolist() == [end, end]
    mask = attention_mask(torch.ones(1, len(groups), dtype=torch.int32), torch.from_numpy(groups)[None])[0, 0]
    assert mask[1, end - 1] and not mask[0, 1] and not mask[end - 1, end]
    assert mask[starts[1], end - 1] and not mask[starts[1], starts[0]]


def test_text_alone_has_no_block(molmo2: Assembly) -> None:
    assert not molmo2.processor.render(sample(annotation("Why?", "So."), count=0)).llm.attention_group.any()


def test_media_of_single_annotations_are_refused(molmo2: Assembly) -> None:
    told = sample(annotation("What?", "A cat.", 0), annotation("Where?", "Here.", 1), count=2)
    with pytest.raises(BadSample, match=r"annotations show media of their own.* dialogue, first or drawn"):
        molmo2.processor.render(told, RenderOptions(annotations="independent"))
    stream = molmo2.processor.render(told, RenderOptions(annotations="dialogue")).llm
    assert [(stream.attention_group == group).sum() for group in (-1, -2)] == [50 + 9, 50 + 9]


def test_no_token_reaches_what_it_learns(molmo2: Assembly) -> None:
    """Images of a later question are a block of their own: one with the first would show it the answer in between."""
    first = annotation("What?", "A cat.", 0, 1)
    told = sample(Annotation(turns=first.turns + annotation("Where?", "Here.", 2).turns), count=3)
    stream = molmo2.processor.render(told, RenderOptions(annotations="dialogue")).llm
    groups = torch.from_numpy(stream.attention_group)
    assert [(groups == group).sum() for group in (-1, -2)] == [2 * (50 + 9), 50 + 9]
    reached = attention_mask(torch.ones(1, len(groups), dtype=torch.int32), groups[None])[0, 0].float()
    for _ in range(3):  # as deep as eight layers
        reached = (reached @ reached > 0).float()
    for place in np.flatnonzero(stream.labels != IGNORE):
        assert not reached[place, place + 1], f"position {place} reads its own target"
