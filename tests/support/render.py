"""Rendering with the options as keywords, as tests write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipelines.sample import Sample
from vlm_train.contracts.layout import MediaLayout
from vlm_train.contracts.streams import CAUSAL, Alignment
from vlm_train.data.processor import Processor
from vlm_train.data.text.render import RenderOptions, TokenizedSample
from vlm_train.data.text.template import Template


def render_sample(
    sample: Sample,
    template: Template,
    tokenizer: Any,
    layout: MediaLayout,
    *,
    streams: Mapping[str, Alignment] = CAUSAL,
    instruction: Any = None,
    **options: Any,
) -> TokenizedSample:
    """The sample under the options that are named, the others as `RenderOptions` has them."""
    processor = Processor(
        tokenizer=tokenizer, template=template, layout=layout, streams=streams, instruction=instruction
    )
    return processor.render(sample, RenderOptions(**options))
