"""Prefix models of an encoder-decoder language model: the image stands in the encoder's text, the decoder answers.

BLIP-2 with Flan-T5 (Li et al. 2023, arXiv 2301.12597, section 3.2) is wired so.

Legend: B rows, S tokens of the encoder, T tokens of the decoder, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from vlm_train.contracts.batch import Batch
from vlm_train.contracts.streams import Alignment
from vlm_train.models.families.prefix_vlm import PrefixVLM
from vlm_train.models.layers.passes import decode_stream


class PrefixSeq2Seq(PrefixVLM):
    """vision -> connector -> merge -> the llm's encoder -> its decoder. `llm` is an `EncoderDecoder`."""

    streams: ClassVar[Mapping[str, Alignment]] = {"llm": "none", "decoder": "seq2seq"}

    def forward(self, batch: Batch, stream: str = "decoder") -> Tensor:
        """Final hidden states `[B, T, D]` of the decoder over `stream`, which answers the stream "llm"."""
        text, answer = batch.text["llm"], batch.text[stream]
        encoded = self.llm.encode(self.embed(batch), (text.segment_ids != 0)[:, None, None])
        start = torch.full_like(answer.ids[:, :1], self.llm.start_id)
        embeds = self.llm.embed(torch.cat([start, answer.ids[:, 1:]], dim=1))
        return decode_stream(self.llm, embeds, answer, encoded=encoded)
