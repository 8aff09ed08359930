"""What the evaluators of two-tower models share: vectors of a shard set's images, and of texts.

Legend: N images, C texts, E width of the shared space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from data_pipelines.errors import BadSample
from data_pipelines.sample import Sample
from data_pipelines.shards.members import caption_annotation
from data_pipelines.shards.shard_set import ShardSet
from vlm_train.data.text.render import RenderOptions
from vlm_train.errors import ConfigError
from vlm_train.evaluation.common import Unusable, evaluation_mode, progress_bar
from vlm_train.evaluation.generate import reference_answer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlm_train.data.images.plan import MediaViews, Views
    from vlm_train.data.processor import Processor
    from vlm_train.data.text.render import TokenizedSample


def image_vectors(
    model: nn.Module, processor: Processor, shards: ShardSet, count: int, batch: int, unusable: Unusable
) -> tuple[Any, list[str]]:
    """Unit vectors `[N, E]` of the images of the first `count` samples, and their captions: the first annotation of
    each. Samples that cannot be used are left out, `batch` images are encoded at a time.

    Raises:
        ConfigError: a sample has not one image, or none can be used.
    """
    import torch

    captions: list[str] = []
    vectors = []
    progress = progress_bar("images", count)
    with evaluation_mode(model):
        for start in range(0, count, batch):
            views = []
            for number in range(start, min(start + batch, count)):
                with unusable.catch_bad_sample(number):
                    caption, view = _captioned_image(processor, shards, number)
                    captions.append(caption)
                    views.append(view)
            if views:
                vectors.append(_encode_images(model, processor, views))
            progress(min(batch, count - start))
    unusable.require_usable(count)
    if not vectors:
        raise ConfigError(f"eval: {shards.address} holds no captions")
    return torch.cat(vectors), captions


def text_vectors(model: nn.Module, processor: Processor, texts: Sequence[str], batch: int) -> Tensor:
    """Unit vectors `[C, E]` of texts, rendered as captions, `batch` at a time."""
    import torch

    from vlm_train.data.collate import collate_prompts

    encode, device = cast(Any, model).encode_text, next(model.parameters()).device
    vectors = []
    with evaluation_mode(model):
        for start in range(0, len(texts), batch):
            samples = [
                Sample(key=f"text-{number}", media=(), annotations=(caption_annotation(text, images=0),), source="eval")
                for number, text in enumerate(texts[start : start + batch])
            ]
            rendered = [processor.render(sample, RenderOptions(annotations="first")) for sample in samples]
            prompts: list[tuple[TokenizedSample, MediaViews]] = [(one, {}) for one in rendered]
            vectors.append(encode(collate_prompts(prompts, processor.images).to(device).text["llm"]))
    return torch.cat(vectors)


def _captioned_image(processor: Processor, shards: ShardSet, number: int) -> tuple[str, dict[str, Views]]:
    """Caption of a sample, and the one view that every encoder has of its image. Raises BadSample without caption."""
    sample, blobs = shards.load_sample(number)
    caption = reference_answer(sample.annotations[0])
    if not caption:
        raise BadSample(f"sample {sample.key!r}: its first annotation is not a caption")
    made = processor.make_views(blobs[:1], media=sample.media[:1])
    views = {name: one for name, items in made.items() for one in items if one is not None and len(one.grids) == 1}
    if not views or len(views) < len(made):
        raise ConfigError(f"eval: needs one image a sample, but {sample.key!r} of {shards.address} has not")
    return caption, views


def _encode_images(model: nn.Module, processor: Processor, views: Sequence[Mapping[str, Views]]) -> Tensor:
    import torch

    from vlm_train.contracts.batch import MediaBatch, map_tensors
    from vlm_train.data.collate import join_views

    device = next(model.parameters()).device
    inputs = {name: join_views([one[name] for one in views], plan) for name, plan in processor.images.items()}
    media = MediaBatch(inputs=inputs, row=torch.arange(len(views)))
    return cast(Any, model).encode_image(map_tensors(media, lambda tensor: tensor.to(device)))
