"""The stream "qformer": the instruction as a Q-Former reads it beside the image, by a tokenizer of its own.

Source: InstructBLIP (Dai et al. 2023, arXiv 2305.06500), LAVIS lavis/models/blip2_models/blip2_t5_instruct.py: the
tokenizer's own special tokens around the text, at most 128 tokens, cut on the left.
"""

from __future__ import annotations

import numpy as np

from vlm_train.data.text.streams import Stream, Tokens, encoder_stream
from vlm_train.data.text.tokenizer import byte_level, load_tokenizer
from vlm_train.errors import ConfigError


class Instruction:
    """Text of the user turns -> stream.

    Args:
        tokenizer: local folder or hub repository; null: one token a byte, which needs no file.
        max_length: most tokens, special ones included; more are cut off the beginning of the text.

    Raises:
        AssetError: the tokenizer cannot be had. ConfigError: `max_length` leaves no room for text.
    """

    def __init__(self, *, tokenizer: str | None, max_length: int = 128) -> None:
        self.tokenizer = byte_level() if tokenizer is None else load_tokenizer("instruction.tokenizer", tokenizer)
        core = self.tokenizer.backend_tokenizer
        room = max_length - core.num_special_tokens_to_add(False)
        if room < 1:
            raise ConfigError(f"instruction.max_length: {max_length} leaves no room for text beside special tokens")
        core.enable_truncation(max_length, direction="left")
        core.encode_special_tokens = True  # what spells a special token in a question is text

    def __call__(self, text: str) -> Stream:
        """The stream of one sample. It is never empty: without text it holds the special tokens, or a padding token."""
        ids = self.tokenizer.backend_tokenizer.encode(text).ids or [self.tokenizer.pad_token_id or 0]
        return encoder_stream(Tokens(np.array(ids, np.int64), np.zeros(len(ids), np.float32), [], [0]))
