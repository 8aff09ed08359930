"""Any whole vision-language model of `transformers`, by its name.

Legend: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlm_train.config.package_files import resolve_package_file
from vlm_train.contracts.batch import Batch, SequenceMask, TokenStream
from vlm_train.contracts.family import Family
from vlm_train.contracts.layout import MediaLayout
from vlm_train.errors import AssetError, ConfigError
from vlm_train.models.hf_vlm.blank_row import extend_mask
from vlm_train.models.hf_vlm.inputs import find_wants, make_inputs
from vlm_train.models.hf_vlm.layout import LibraryLayout
from vlm_train.models.hf_vlm.parts import Connector, Decoder, Part, Paths, Tower, detach_nested, find_paths
from vlm_train.models.hf_vlm.probe import find_contamination
from vlm_train.models.hf_vlm.processor import LibraryProcessor
from vlm_train.models.hf_vlm.shapes import find_unused, trace_shapes
from vlm_train.models.layers.attention import PACKED, decoding, register_packed
from vlm_train.models.layers.passes import make_sequence_mask
from vlm_train.models.llms.library_masks import MASKED_LAYERS
from vlm_train.models.weights.hub import ATTENTION, load_pretrained

IMAGE_IDS = ("image_token_id", "image_token_index", "media_placeholder_token_id")
"""What configurations call the token that stands for a feature."""
TYPES = ("mm_token_type_ids", "token_type_ids")


class HFVLM(Family):
    """A model of `AutoModelForImageTextToText` with its own processor; its parts are found from its structure.

    Args:
        name: a local folder or a hub name: its configuration and its processor. No code of it runs.
        weights: where its weights are, read by `load_weights`; None: random.
        config: values that take the place of the configuration's, `{text_config: {num_hidden_layers: 2}}`.
        attention: of the language model: `packed` (as `sdpa`, but packed samples each by themselves), `sdpa` or
            `eager`. A model that packed attention cannot run takes `sdpa`.
        vision_attention: of all else, `sdpa` or `eager`.
    """

    _shells: list[nn.Module]

    def __init__(
        self,
        *,
        name: str,
        weights: str | None = None,
        config: Mapping[str, Any] | None = None,
        attention: str = PACKED,
        vision_attention: str = "sdpa",
    ) -> None:
        super().__init__()
        self.name, self.weights = resolve_package_file(name), weights
        numbers = read_config(self.name, config or {})
        self.image_id = find_image_id(numbers)
        self.processor = LibraryProcessor(self.name, self.image_id)
        whole, self.attention = build_whole(numbers, attention, vision_attention)
        self.vision: Any = None
        self.connector: Any = None
        self.llm: Any = None
        self.paths: Paths = {}
        self._adopt(whole)
        self._unused: list[str] | None = None

    @property
    def whole(self) -> Any:
        """The library's model."""
        return self.llm.model

    def forward(self, batch: Batch, stream: str = "llm") -> Tensor:
        """Final hidden states `[B, T, D]`: the library's own forward pass, all but its head."""
        text = batch.text[stream]
        rows, length = text.ids.shape
        if text.ids.is_meta:
            return trace_shapes(self.whole, text.ids, batch.media.inputs["vision"].fields)
        inputs = make_inputs(batch, text, self.wants, blank=True)
        mask, (given, width) = self._find_mask(text), inputs["input_ids"].shape
        if mask is not None and given > rows:
            mask = extend_mask(mask, rows, length, width)
        with decoding(mask), _without_head(self.whole) as found:
            self.whole(**inputs, **self._uncached)
        return found[0][:rows, :length]

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., D]` -> `[..., V]`."""
        return self.llm.head(hidden)

    @torch.no_grad()
    def generate(
        self, batch: Batch, *, max_new_tokens: int, eos_ids: list[int], stream: str = "llm", **sampling: Any
    ) -> Tensor:
        """Answers `[B, up to max_new_tokens]` to the prompts in `batch` (one segment a row, padded on either side)."""
        from transformers import GenerationConfig

        text = batch.text[stream]
        needs = inspect.signature(self.whole.forward).parameters["pixel_values"]  # BLIP-2's has no default
        inputs = make_inputs(batch, text, self.wants, blank=needs.default is inspect.Parameter.empty)
        inputs.pop("position_ids", None)  # the library counts them as it goes on
        order = inputs["attention_mask"].argsort(dim=1, stable=True)  # padding to the left, real tokens in their order
        for name in ("input_ids", "attention_mask", "cross_attention_mask", *TYPES):
            if (one := inputs.get(name)) is not None:
                inputs[name] = one.gather(1, order.view(*order.shape, *[1] * (one.ndim - 2)).expand_as(one))
        temperature = sampling.pop("temperature", 0.0)
        drawn = {"temperature": temperature, "top_p": sampling.pop("top_p", 1.0), "top_k": 0} if temperature else {}
        sampling.pop("top_p", None)
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=bool(temperature),
            eos_token_id=list(eos_ids) or None,
            pad_token_id=eos_ids[0] if eos_ids else 0,
            **drawn,
            **{key: value for key, value in sampling.items() if value},
        )
        found = self.whole.generate(**inputs, generation_config=settings)[: len(text.ids)]
        length = inputs["input_ids"].shape[1]
        repeats = found.shape[1] > length and torch.equal(found[:, :length], inputs["input_ids"][: len(found)])
        return found[:, length:] if repeats or found.shape[1] > max_new_tokens else found

    def media_layout(self, images: Mapping[str, Any]) -> MediaLayout:
        """The tokens that the processor writes for each image."""
        return LibraryLayout(images["vision"])

    def unused_parameters(self) -> list[str]:
        """Full names of parameters that no image and no text reaches."""
        if self._unused is None:
            self._unused = find_unused(self)
        return self._unused

    def parameters_read_here(self) -> list[nn.Parameter]:
        """Single parameters, such as newline vectors, of modules that hold several parts: this forward pass reads them,
        and no module of their own, so that ZeRO-3 gathers them for it."""
        return [one for part in self.children() for one in part.parameters(recurse=False)]

    def load_weights(self) -> None:
        """Read `weights`. Raises `AssetError` if they are not those of this architecture."""
        if self.weights is not None:
            self._adopt(load_pretrained(self.whole, self.weights, setting="model.weights"))

    def train(self, mode: bool = True) -> HFVLM:
        """The library's modules that hold several parts follow too."""
        super().train(mode)
        for module in self._shells:
            module.training = mode
        return self

    def find_packing_problem(self) -> str | None:
        """Why samples of this model cannot share a row; None: they can. Tried on the model itself, where it has
        weights."""
        if not self.llm.takes_packed:
            return f"{type(self.whole).__name__} runs model.attention={self.attention}, which takes one sample a row"
        if self.llm.unmasked_mixers:
            return f"{', '.join(self.llm.unmasked_mixers)} carry one sample's state into the next"
        return None if next(self.llm.parameters()).is_meta else find_contamination(self)

    def library_state(self, states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """States of parts, by their names here -> one by the names in the library's model."""
        parts = {name: part for name, part in self.named_children() if isinstance(part, Part)}
        return {parts[part].name_in_library(key): one for part, state in states.items() for key, one in state.items()}

    def _adopt(self, whole: Any) -> None:
        from transformers import GenerationConfig

        whole.generation_config = GenerationConfig()
        whole.get_decoder().set_attn_implementation(self.attention)  # reading weights gives all parts the same
        self.paths = find_paths(whole)
        decoder = Decoder(whole, self.paths["llm"], self.weights, self.attention == PACKED)
        tower = Tower(whole, self.paths["vision"], self.weights, self.processor)
        connector = Connector(whole, self.paths["connector"], self.weights)
        others = {name: Part(whole, paths, self.weights) for name, paths in self.paths.items() if name not in PARTS}
        detach_nested(whole, self.paths)
        self.vision, self.connector, self.llm = tower, connector, decoder
        for name, part in others.items():
            self.add_module(name, part)
        held = {id(module) for module in self.modules()}
        object.__setattr__(self, "_shells", [one for one in whole.modules() if id(one) not in held])
        self.wants = find_wants(whole, self.image_id, self.processor.type_ids)
        taken = inspect.signature(whole.forward).parameters
        self._uncached = {"use_cache": False} if "use_cache" in taken or "kwargs" in taken else {}

    def _find_mask(self, text: TokenStream) -> SequenceMask | None:
        """Who sees whom, where samples share rows or branch. Raises `ConfigError` where the model cannot be told."""
        if text.plain_causal:
            return None
        if not self.llm.takes_packed or not (text.causal or text.masked):
            raise ConfigError(
                f"model.name: {type(self.whole).__name__} with model.attention={self.attention} takes one sample a "
                "row: use data.pack=null and data.annotations=dialogue, first or drawn"
            )
        return make_sequence_mask(text)


PARTS = ("vision", "connector", "llm")


def read_config(name: str, changes: Mapping[str, Any]) -> Any:
    """The configuration of a folder or hub name, with `changes`. Raises `AssetError` if it cannot be had."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # damaged files raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AssetError(f"model.name: no configuration could be loaded from {name!r}: {reason}") from error
    if not changes:
        return config
    values = _merge(config.to_dict(), changes)
    return type(config).from_dict(values)


def find_image_id(config: Any) -> int:
    """The token that stands for a feature. Raises `ConfigError` where the configuration names none."""
    found = next((one for key in IMAGE_IDS if (one := getattr(config, key, None)) is not None), None)
    if found is None:
        raise ConfigError(
            f"model.name: the configuration of {config.model_type!r} names no {', '.join(IMAGE_IDS)}; allowed: models "
            "in whose text a token stands for an image"
        )
    return int(found)


def build_whole(config: Any, attention: str, vision_attention: str) -> tuple[Any, str]:
    """A random model, and the attention of its language model: `packed` only where that runs.

    Raises:
        ConfigError: the library has no such model, or it cannot attend so.
    """
    from transformers import AutoModelForImageTextToText

    for setting, value, allowed in (
        ("attention", attention, (PACKED, *ATTENTION)),
        ("vision_attention", vision_attention, ATTENTION),
    ):
        if value not in allowed:
            raise ConfigError(f"model.{setting}: {value!r}; allowed: {', '.join(allowed)}")
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ConfigError(f"model.name: {config.model_type!r} is no image-text-to-text model of transformers")
    if config.is_encoder_decoder or getattr(config.get_text_config(), "is_encoder_decoder", False):
        raise ConfigError(f"model.name: {config.model_type!r} is an encoder-decoder; allowed: causal language models")
    register_packed()
    try:
        whole = AutoModelForImageTextToText.from_config(config, attn_implementation=vision_attention)
    except ValueError as error:
        raise ConfigError(f"model.name: cannot build {config.model_type!r}: {error}") from error
    decoder = whole.get_decoder()
    if attention == PACKED and not _packs(whole, decoder):
        attention = "sdpa" if getattr(decoder, "_supports_sdpa", False) else "eager"
    return whole, attention


def _packs(whole: Any, decoder: Any) -> bool:
    """Whether packed attention may run: plain causal layers, which find their attention by its name."""
    text = whole.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    names = set(inspect.signature(whole.forward).parameters)
    both_ways = "token_type_ids" in names or getattr(text, "use_bidirectional_attention", None)
    runs = getattr(decoder, "_supports_sdpa", False) and decoder.is_backend_compatible()
    return bool(runs) and not both_ways and not kinds - MASKED_LAYERS and "cross_attention_mask" not in names


@contextmanager
def _without_head(whole: Any) -> Iterator[list[Tensor]]:
    """Inside the `with`, the head is not computed: what it was given is in the list."""
    head, found = whole.get_output_embeddings(), list[Tensor]()

    def keep(hidden: Tensor) -> Tensor:
        found.append(hidden)
        return hidden

    head.forward = keep
    try:
        yield found
    finally:
        del head.forward


def _merge(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in changes.items():
        own = merged.get(key)
        merged[key] = _merge(own, value) if isinstance(own, dict) and isinstance(value, Mapping) else value
    return merged
