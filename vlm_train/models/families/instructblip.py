"""Prefix models whose Q-Former also reads the instruction, so that what it takes from an image depends on the question.

InstructBLIP (Dai et al. 2023, arXiv 2305.06500, section 2.3) is wired so.

Legend: D_v and D, widths of the tower and of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from vlm_train.contracts.batch import Batch
from vlm_train.contracts.media import Features
from vlm_train.contracts.streams import Alignment
from vlm_train.errors import ConfigError
from vlm_train.models.families.prefix_seq2seq import PrefixSeq2Seq
from vlm_train.models.families.prefix_vlm import PrefixVLM


class InstructVLM(PrefixVLM):
    """vision -> a Q-Former that reads the stream "qformer" -> merge -> llm.

    Args:
        connector: a `QFormerConnector` with `text: true`.
    """

    streams: ClassVar[Mapping[str, Alignment]] = {"llm": "causal", "qformer": "none"}

    def __init__(self, *, vision: Any, connector: Any, llm: Any) -> None:
        if getattr(connector, "text", None) is None:
            raise ConfigError("model: the instruction needs a Q-Former that reads text: connector.text=true")
        super().__init__(vision=vision, connector=connector, llm=llm)

    def connect(self, patches: Features, batch: Batch) -> Features:
        """Width D_v -> D; every view is read with the instruction of its row."""
        text, media = batch.text["qformer"], batch.media
        shown = media.inputs["vision"]
        counts = torch.tensor(shown.view_counts, dtype=torch.int64).to(media.row.device, non_blocking=True)
        rows = torch.repeat_interleave(media.row, counts, output_size=shown.views_total)
        if not shown.views_total:  # the blank view
            rows = rows.new_zeros(len(patches.grids))
        return self.connector.read_with_instruction(patches, text.ids[rows], (text.segment_ids != 0)[rows])


class InstructSeq2Seq(InstructVLM, PrefixSeq2Seq):
    """The same in front of an encoder-decoder, whose encoder reads the instruction once more."""

    streams: ClassVar[Mapping[str, Alignment]] = {"llm": "none", "decoder": "seq2seq", "qformer": "none"}
