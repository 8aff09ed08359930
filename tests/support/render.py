"""Rendering with the options as keywords, as tests write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from data_pipelines.sample import Sample
from vlm_train.contracts.layout import MediaLayout
from vlm_train.contracts.streams import CAUSAL, Alignment
from vlm_train.data.text import render
from vlm_train.data.text.streams import Stream
from vlm_train.data.text.template import Template


def render_sample(
    sample: Sample,
    template: Template,
    tokenizer: Any,
    layout: MediaLayout,
    *,
    streams: Mapping[str, Alignment] = CAUSAL,
    instruction: Callable[[str], Stream] | None = None,
    **options: Any,
) -> render.TokenizedSample:
    """The sample under the options that are named, the others as `RenderOptions` has them."""
    how = render.RenderOptions(**options)
    return render.render_sample(sample, template, tokenizer, layout, how, streams=streams, instruction=instruction)
