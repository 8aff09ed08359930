"""The processor of a run: all that turns a sample into what the model reads, and tokens back into text.

`build.py` makes it once. The loader, the evaluators and whoever shows a sample take it as it is; it pickles, so that
worker processes have the same one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from data_pipelines.errors import BadSample
from data_pipelines.media.video import is_video
from data_pipelines.sample import MediaItem, Sample
from vlm_train.contracts.layout import MediaLayout, MediaSize
from vlm_train.contracts.streams import CAUSAL, Alignment
from vlm_train.data.images.plan import ImagePlan, MediaViews, Views
from vlm_train.data.text.instruction import Instruction
from vlm_train.data.text.render import DEFAULT_OPTIONS, RenderOptions, TokenizedSample, make_streams
from vlm_train.data.text.split import NoPiece
from vlm_train.data.text.template import Template
from vlm_train.data.text.tokenize import ConversationTokenizer
from vlm_train.errors import ConfigError
from vlm_train.seeds import derive_seed


@dataclass(frozen=True, kw_only=True)
class Processor:
    """Samples -> token streams and views; tokens -> text.

    Args:
        layout: how many placeholder tokens a sample's media take, and how they stand.
        images: name of a vision encoder -> its image plan; empty: the model has none.
        instruction: writes the stream "qformer" from the text of the user turns, where the model reads one.
        streams: the token streams that the model reads, and how their labels are aligned. One aligned `seq2seq` takes
            the last answer, and "llm" all that precedes it.
        max_length: most tokens of a stream in training; None: no limit.
    """

    tokenizer: Any
    template: Template
    layout: MediaLayout
    images: Mapping[str, ImagePlan] = field(default_factory=dict)
    instruction: Instruction | None = None
    streams: Mapping[str, Alignment] = field(default_factory=lambda: dict(CAUSAL))
    max_length: int | None = None

    def render(self, sample: Sample, options: RenderOptions = DEFAULT_OPTIONS) -> TokenizedSample:
        """The token streams of a sample for training, or (with `generation`) the prompt of one annotation up to its
        last answer.

        Raises:
            BadSample: nothing to learn, too long, or annotations that cannot share a prefix. Names the sample.
            ConfigError: layout, template and tokenizer do not fit each other; or too long with `error`.
        """
        pieces = self.layout(measure_media(sample.media))
        positions, both_ways = (getattr(self.layout, name, None) for name in ("positions", "both_ways"))
        conversation = ConversationTokenizer(self.template, self.tokenizer, pieces, positions, both_ways)
        try:
            streams, reference = make_streams(sample, conversation, self.streams, self.instruction, options)
        except NoPiece:
            raise
        except BadSample as error:
            raise BadSample(f"sample {sample.key!r}: {error}", kind=error.kind) from error
        except ConfigError as error:
            raise type(error)(f"sample {sample.key!r}: {error}") from error
        placed = {one.slot.item for stream in streams.values() for one in stream.slots}
        media = tuple(item for item, laid in enumerate(pieces) if item in placed or not laid)
        return TokenizedSample(key=sample.key, streams=streams, media=media, reference=reference)

    def make_views(
        self,
        blobs: Sequence[bytes],
        *,
        media: Sequence[MediaItem] | None = None,
        shown: Collection[int] | None = None,
        address: tuple[int, int, int] | None = None,
        where: str = "image",
    ) -> MediaViews:
        """What every vision encoder is given of a sample's encoded images and videos.

        Args:
            media: what the sample says of them; a view of another grid than these sizes give is then a bad sample.
            shown: items that the model sees; None: all.
            address: in training the run's seed, the pass and the sample's number: nothing else decides what is random,
                and every encoder draws the same. None: nothing is random.
            where: shard and key, for messages.

        Raises:
            BadSample: see `ImagePlan`.
        """
        images = sum(not is_video(blob) for blob in blobs)
        found: dict[str, list[Views | None]] = {}
        for name, plan in self.images.items():
            generator = None
            if address is not None and plan.random:
                seed, epoch, index = address
                generator = np.random.default_rng(derive_seed(seed, "sample", epoch, index))
            wanted = range(len(blobs)) if shown is None else shown
            found[name] = [
                plan(blob, generator, where, images=images) if n in wanted else None for n, blob in enumerate(blobs)
            ]
            shape = getattr(plan, "shape", None)
            for item, size, views in zip(media or (), measure_media(media or ()), found[name]):
                if views is None:
                    continue
                if views.grids != tuple(plan.grids(size)) or (shape is not None and views.shape != shape(size)):
                    raise BadSample(
                        f"{where}: {item.name} is not {item.width} x {item.height} pixels upright, as its entry says; "
                        "build or index the shard set again",
                        kind="image",
                    )
        return found

    @cached_property
    def end_ids(self) -> list[int]:
        """Tokens that end an answer: the tokenizer's end of text and, if it is one token, what the template ends
        with."""
        eos = self.tokenizer.eos_token_id
        found = [] if eos is None else [eos]
        end = _find_token(self.tokenizer, self.template.answer_end(self.tokenizer))
        return found if end is None or end in found else [*found, end]

    def ends_answer(self, ids: Sequence[int]) -> bool:
        """Whether generated tokens come to an ending token, or to what the template ends with."""
        suffix = self.template.answer_end(self.tokenizer).strip()
        if any(token in self.end_ids for token in ids):
            return True
        return bool(suffix) and suffix in str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def decode_answer(self, ids: Sequence[int]) -> str:
        """The text before the first ending token, and before what the template ends with, be it several tokens
        (`###`)."""
        stop = next((position for position, token in enumerate(ids) if token in self.end_ids), len(ids))
        text = str(self.tokenizer.decode(list(ids[:stop]), skip_special_tokens=True))
        suffix = self.template.answer_end(self.tokenizer).strip()
        return text.partition(suffix)[0] if suffix else text


def measure_media(media: Sequence[MediaItem]) -> list[MediaSize]:
    """What layouts and image plans know of all media items of a sample."""
    return [
        MediaSize(one.width, one.height, one.frames, one.seconds, images=sum(other.kind == "image" for other in media))
        for one in media
    ]


def _find_token(tokenizer: Any, suffix: str) -> int | None:
    """The token that `suffix` is behind a word, or without its blanks; None where it is not one."""
    if (name := suffix.strip()) in tokenizer.get_vocab():
        return int(tokenizer.convert_tokens_to_ids(name))
    core = tokenizer.backend_tokenizer
    word, whole = (core.encode(text, add_special_tokens=False).ids for text in ("a", f"a{suffix}"))
    return int(whole[-1]) if len(whole) == len(word) + 1 and whole[:-1] == word else None
