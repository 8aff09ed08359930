"""A processor of `transformers`: what a model is given of an image, and the tokens that stand for it in the text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from vlm_train.config.hub_files import read_json_file
from vlm_train.contracts.layout import MediaSize, Piece, Slot
from vlm_train.errors import AssetError, ConfigError

VIDEOS = "video_processor"
OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""What processors return of a text."""
KEPT_SIZES = 4096
"""Image sizes whose tokens are remembered: data sets repeat them."""


class LibraryProcessor:
    """The processor of a model folder or hub name. Picklable: data workers run it.

    Args:
        source: a local folder or a hub name.
        image_id: the token that the model replaces by a feature, or that stands for an image it attends to.

    Attributes:
        inner: the library's own processor.
        media_text: what stands for an image in a text before the processor expands it.
        type_ids: tokens that the library counts as those of an image.
    """

    def __init__(self, source: str, image_id: int) -> None:
        self.source = source
        self.inner = load_processor(source)
        self.tokenizer = prepare_tokenizer(self.inner)
        self.image_id = image_id
        self.media_text = str(self.tokenizer.media_text)
        ids = [one for one in getattr(self.inner, "image_token_ids", ()) if one is not None]
        self.type_ids = tuple(sorted({*ids, image_id}))
        self._expanded: dict[tuple[int, int], tuple[int, ...]] = {}

    def __reduce__(self) -> Any:
        """Read again where it is sent to: the library makes classes that do not pickle."""
        return LibraryProcessor, (self.source, self.image_id)

    def list_content(self) -> list[Any]:
        """What decides how many tokens a sample has: for the cache of lengths."""
        return [self.inner.to_json_string(), self.tokenizer, self.image_id]

    def prepare(self, picture: Image.Image | np.ndarray) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
        """An RGB picture -> what the model is given of it by name, and the ids of the tokens that stand for it."""
        image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
        options = self.inner._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, return_tensors="pt")
        if _expands_itself(self.inner):
            nested = self.inner.prepare_inputs_layout(images=[image], text=[self.media_text])[0]
            found, texts = self.inner._process_images(nested, **options["images_kwargs"])
            ids = self.tokenizer(texts[0], add_special_tokens=False)["input_ids"]
        else:
            found = dict(self.inner(images=[image], text="", return_tensors="pt"))
            written = found["input_ids"][0].tolist()
            found = {name: value for name, value in found.items() if name not in OF_TEXT}
            places = [place for place, one in enumerate(written) if one == self.image_id]
            ids = written[places[0] : places[-1] + 1] if places else []
        if self.image_id not in ids:
            raise ConfigError(
                f"model.name: {type(self.inner).__name__} writes no token {self.image_id} for an image, which the "
                "model's configuration names as image_token_id; its processor and its configuration do not fit"
            )
        fields = {name: array for name, value in found.items() if (array := _as_array(value)) is not None}
        return fields, tuple(ids)

    def expand(self, size: MediaSize) -> tuple[int, ...]:
        """Ids of the tokens that stand for an image of this size: those of a black one."""
        key = (size.width, size.height)
        if key not in self._expanded:
            if len(self._expanded) >= KEPT_SIZES:
                self._expanded.clear()
            with torch.device("cpu"):  # dry runs ask inside `meta`
                self._expanded[key] = self.prepare(Image.new("RGB", key))[1]
        return self._expanded[key]

    def count_tokens(self, size: MediaSize) -> int:
        """Placeholders of an image of this size."""
        return self.expand(size).count(self.image_id)

    def list_pieces(self, item: int, size: MediaSize) -> list[Piece]:
        """The same as pieces of a layout: literal tokens, and runs of placeholders."""
        pieces = list[Piece]()
        run = 0
        for token in (*self.expand(size), None):
            if token == self.image_id:
                run += 1
                continue
            if run:
                pieces.append(Slot(item, run))
                run = 0
            if token is not None:
                pieces.append(str(self.tokenizer.convert_ids_to_tokens(token)))
        return pieces


def load_processor(source: str) -> Any:
    """The processor of a model, without its videos where torchvision, which they need, is not installed.

    Raises:
        AssetError: it cannot be loaded. ConfigError: it has no tokenizer or no image processor.
    """
    try:
        found = _choose_class(source).from_pretrained(source)
    except Exception as error:  # any code of the library, and damaged files, raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AssetError(
            f"model.name: no processor could be loaded from {source!r}: {reason}. Give a folder that holds "
            "preprocessor_config.json and the tokenizer's files"
        ) from error
    for name in ("tokenizer", "image_processor"):
        if getattr(found, name, None) is None:
            raise ConfigError(f"model.name: {source!r} has a {type(found).__name__} without {name}")
    return found


def prepare_tokenizer(processor: Any) -> Any:
    """The processor's tokenizer, with the chat template of the model and, as `media_text`, what it writes for an image.

    Raises:
        ConfigError: it has no fast version.
    """
    tokenizer = processor.tokenizer
    if not tokenizer.is_fast:
        raise ConfigError("model.name: its tokenizer has no fast version, and labels need its character offsets")
    if not tokenizer.chat_template and getattr(processor, "chat_template", None):
        tokenizer.chat_template = processor.chat_template
    token = getattr(processor, "image_token", None) or getattr(tokenizer, "image_token", None) or "<image>"
    tokenizer.media_text = getattr(token, "content", token)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _choose_class(source: str) -> Any:
    """The class that loads the processor of a folder: the library's, or, where torchvision is missing, that of its kind
    without videos."""
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        return AutoProcessor
    named = read_json_file(source, "processor_config.json", "model.name") or {}
    model_type = AutoConfig.from_pretrained(source).model_type
    name = named.get("processor_class") or PROCESSOR_MAPPING_NAMES.get(model_type)
    kind = getattr(transformers, str(name), None)
    if kind is None:
        return AutoProcessor
    if VIDEOS not in kind.get_attributes():
        return kind

    return without_videos(kind)


def without_videos(kind: Any) -> Any:
    """A processor class like `kind` that has no video processor, which cannot be made without torchvision."""

    class ImagesOnly(kind):
        """Reads, holds and writes all but the video processor."""

        fewer = False

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [one for one in kind.get_attributes() if one != VIDEOS or not cls.fewer]

        @classmethod
        def _get_arguments_from_pretrained(cls, *args: Any, **options: Any) -> Any:
            found = _call_with_fewer(cls, super()._get_arguments_from_pretrained, *args, **options)
            return [*found[: (place := kind.get_attributes().index(VIDEOS))], None, *found[place:]]

        def save_pretrained(self, *args: Any, **options: Any) -> Any:
            return _call_with_fewer(type(self), super().save_pretrained, *args, **options)

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return type(argument)

    ImagesOnly.__name__ = kind.__name__  # what saved files say
    return ImagesOnly


def _call_with_fewer(kind: Any, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call the library while the class says that it has no videos: it counts arguments otherwise."""
    kind.fewer = True
    try:
        return call(*args, **options)
    finally:
        kind.fewer = False


def _expands_itself(processor: Any) -> bool:
    from transformers.processing_utils import ProcessorMixin

    return type(processor).replace_image_token is not ProcessorMixin.replace_image_token


def _as_array(value: Any) -> np.ndarray | None:
    """Numbers as an array whose first axis is that of images; None for what is no number."""
    if isinstance(value, torch.Tensor):
        return value.numpy()
    try:
        found = np.asarray(value)
    except ValueError:
        return None
    return found if found.dtype.kind in "iufb" and found.ndim else None
