"""Prefix models whose Q-Former also reads the instruction, so that what it takes from an image depends on the question.

InstructBLIP (Dai et al. 2023, arXiv 2305.06500, section 2.3) is wired so.

Legend: N views, P patches, Q queries, T tokens of an instruction, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_train.data.batch import Batch
from vlm_train.data.layout import Grid
from vlm_train.data.streams import Alignment
from vlm_train.errors import ConfigError
from vlm_train.models.prefix import PrefixVLM
from vlm_train.models.seq2seq import PrefixSeq2Seq


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

    def connect(self, patches: Tensor, grid: Grid, batch: Batch) -> Tensor:
        """`[N, P, D_v]` -> `[N, Q, D]`; every view is read with the instruction of its row."""
        text, media = batch.text["qformer"], batch.media
        counts = torch.tensor(media.view_counts, dtype=torch.int64, device=media.row.device)
        rows = torch.repeat_interleave(media.row, counts, output_size=media.real)
        if not media.real:  # the blank view
            rows = torch.zeros(len(patches), dtype=torch.int64, device=patches.device)
        return self.connector.instructed(patches, text.ids[rows], (text.segment_ids != 0)[rows])


class InstructSeq2Seq(InstructVLM, PrefixSeq2Seq):
    """The same in front of an encoder-decoder, whose encoder reads the instruction once more."""

    streams: ClassVar[Mapping[str, Alignment]] = {"llm": "none", "decoder": "seq2seq", "qformer": "none"}
