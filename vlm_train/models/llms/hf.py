"""Any `transformers` causal language model, taken apart into embed, decode and head.

Legend: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vlm_train.contracts.batch import SequenceMask
from vlm_train.contracts.cross_states import CrossStates
from vlm_train.errors import ConfigError
from vlm_train.models.layers.attention import PACKED, decoding, register_packed
from vlm_train.models.layers.flash import FLASH
from vlm_train.models.layers.flex import FLEX
from vlm_train.models.layers.inserted_blocks import BlockInserter, MakeBlock
from vlm_train.models.layers.response_dropout import ResponseDropout
from vlm_train.models.llms.growing_rope import has_growing_rope, skip_rope_growth
from vlm_train.models.llms.library_masks import MASKED_LAYERS, make_library_mask, prompt_inputs
from vlm_train.models.llms.mixers import mixers_without_mask
from vlm_train.models.llms.new_tokens import ExtendedEmbedding, ExtendedHead
from vlm_train.models.weights.hub import ATTENTION, build_model, load_pretrained, with_vocabulary
from vlm_train.models.weights.inside import load_inside

PACKS = (PACKED, FLASH, FLEX)
"""Attentions that take packed samples each by itself."""
LAYER_LISTS = ("layers", "h", "blocks")
WITHOUT_HEAD = ("qwen2_vl_text", "qwen2_5_vl_text")
"""`model_type` of language models that the library has only inside whole models."""


class HFCausalLM(nn.Module):
    """A causal language model built from `config`; images enter as embeddings.

    Args:
        config: `{model_type, ...}`, the fields of the `transformers` configuration;
            `vocab_size: null` takes the length of the tokenizer.
        weights: hub name, local folder or `*.gguf` file, read by `load_weights`; None: random.
        vocab_size: length of the tokenizer.
        new_tokens: rows beyond the base vocabulary, as parameters of their own (`new_embeddings`, `new_head`).
        predict_new_tokens: false: new tokens are only read, and have no logits.
        attention: `packed` (as `sdpa`, but packed samples each by themselves), `flash` (that by the flash-attn
            package), `flex` (that by FlexAttention), `sdpa` or `eager`.
        tokens_per_second: of a model whose positions have three axes: positions of time that a second of a video takes
            (Qwen2.5-VL: 2); None: one for every row of its grid.
        response_residual_dropout: of the positions whose label is learned, see `ResponseDropout`.
    """

    def __init__(
        self,
        *,
        config: Mapping[str, Any],
        weights: str | None = None,
        vocab_size: int | None = None,
        new_tokens: int = 0,
        predict_new_tokens: bool = True,
        attention: str = PACKED,
        tokens_per_second: float | None = None,
        response_residual_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM

        if config.get("model_type") in WITHOUT_HEAD:
            from vlm_train.models.llms.qwen_vl import register_qwen_text

            register_qwen_text()
        self.numbers = with_vocabulary(config, vocab_size)
        self.weights = weights
        self.new_tokens, self.predict_new_tokens = new_tokens, predict_new_tokens
        self.inserter = BlockInserter()
        register_packed()
        self.model = build_model(AutoModelForCausalLM, "llm", self.numbers, attention, (*PACKS, *ATTENTION))
        self.takes_packed = attention in PACKS
        if self.takes_packed and not (self.model._supports_sdpa and self.model.is_backend_compatible()):
            other = "sdpa" if self.model._supports_sdpa else "eager"
            raise ConfigError(f"llm.attention: {self.numbers['model_type']!r} cannot run {attention}; choose {other}")
        rotary = getattr(self.model.config, "rope_parameters", None) or {}
        self.position_axes, self.tokens_per_second = 3 if "mrope_section" in rotary else 1, tokens_per_second
        self.dim = self.model.get_input_embeddings().weight.shape[1]
        self.base_vocab_size = self.model.get_input_embeddings().weight.shape[0]
        self.vocab_size = self.base_vocab_size + (new_tokens if predict_new_tokens else 0)
        self.layer_kinds = frozenset(getattr(self.model.config, "layer_types", None) or ())
        self.rope_grows = has_growing_rope(self.decoder)
        self.unmasked_mixers = mixers_without_mask(self._find_layers() or (), self.layer_kinds)
        self.response_dropout = ResponseDropout(response_residual_dropout)
        self._add_tokens()

    @property
    def decoder(self) -> nn.Module:
        """The model without its head."""
        return self.model.get_decoder()

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder blocks."""
        layers = self._find_layers()
        if layers is None:
            raise ConfigError(f"llm.config.model_type: {type(self.decoder).__name__} does not expose its layers")
        return layers

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids `[B, T]` -> embeddings `[B, T, D]`; negative ids (placeholders) give token 0's."""
        return self.model.get_input_embeddings()(ids.clamp(min=0))

    def insert(self, make_block: MakeBlock, *, every: int = 1) -> nn.ModuleList:
        """Insert a block before every `every`-th layer, see `LanguageModel.insert`."""
        return self.inserter.insert(self.layers, make_block, every)

    def decode(
        self,
        embeds: Tensor,
        positions: Tensor,
        mask: Tensor | SequenceMask | None,
        *,
        cross_states: CrossStates | None = None,
        response: Tensor | None = None,
    ) -> Tensor:
        """Embeddings `[B, T, D]`, positions `[A, B, T]`, mask `[B, 1, T, T]` (True = attend) -> hidden `[B, T, D]`.

        Without a mask attention is plain causal (padding on the right does no harm then); with a `SequenceMask` each
        sample attends by itself. Fast kernels run only so. The inserted blocks read `cross_states`, response dropout
        `response` `[B, T]` (True = its label is learned).

        Raises:
            ConfigError: the model cannot take this mask, or these position axes.
        """
        if mask is not None:
            self._check_mask(mask)
        if len(positions) > 1:
            self._check_position_axes(len(positions))
        if self.rope_grows:
            skip_rope_growth(self.decoder, embeds.shape[1])
        if self.takes_packed and not isinstance(mask, Tensor):
            # Packed attention gets the sequences by itself. Given no mask at all, the library guesses from position ids
            # what is packed, and asks the device: a mask of tokens, which nothing reads, keeps it from guessing.
            library_mask: Any = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        else:
            library_mask = make_library_mask(self.model.config, mask, embeds)
        blocks = (
            nullcontext() if cross_states is None and not self.inserter.groups else self.inserter.given(cross_states)
        )
        sequences = mask if isinstance(mask, SequenceMask) else None
        dropping = self.response_dropout.given(response) if self.response_dropout else nullcontext()
        with blocks, dropping, decoding(sequences):
            output = self.model.get_decoder()(
                inputs_embeds=embeds,
                attention_mask=library_mask,
                position_ids=positions if len(positions) > 1 else positions[0],
                use_cache=False,
            )
        return output.last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states `[..., D]` -> logits `[..., V]`, scaled and soft-capped as the model's family does."""
        return scale_logits(self.model.get_output_embeddings()(hidden), self.model.config)

    @torch.no_grad()
    def generate(
        self,
        embeds: Tensor,
        mask: Tensor,
        *,
        max_new_tokens: int,
        eos_ids: Sequence[int],
        temperature: float = 0.0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        min_new_tokens: int = 0,
        num_beams: int = 1,
        positions: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        cross_states: CrossStates | None = None,
    ) -> Tensor:
        """Continue prompts with a key-value cache.

        Args:
            embeds: `[B, T, D]` prompt embeddings, padded on the LEFT.
            mask: `[B, T]`, True at real tokens.
            temperature: 0 is greedy.
            repetition_penalty, min_new_tokens: as in `Sampling`; the penalty does not see the prompt.
            positions: `[A, B, T]` of a model with several position axes; None: they count real tokens.
            prompt_mask: `[B, 1, T, T]`, who may attend to whom inside the prompts; None: they are causal.
            cross_states: as in `decode`, for the tokens of the padded prompts.

        Returns:
            `[B, up to max_new_tokens]` new token ids; a row that ended is filled up with its end-of-text token.
        """
        from transformers import GenerationConfig

        if self.rope_grows:
            skip_rope_growth(self.decoder, embeds.shape[1] + max_new_tokens)
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens or None,
            repetition_penalty=repetition_penalty,
            do_sample=temperature > 0,
            num_beams=num_beams,
            eos_token_id=list(eos_ids) or None,
            pad_token_id=eos_ids[0] if eos_ids else 0,
            use_cache=True,
            **sampling,
        )
        with self.inserter.given(cross_states), self.inserter.following_cache(self.decoder):
            inputs = prompt_inputs(self.model, embeds, mask, positions, prompt_mask, num_beams)
            return self.model.generate(**inputs, generation_config=settings)

    def head_parameters(self) -> list[str]:
        """Names of the parameters that only `head` reads (none where it shares the embedding's)."""
        embedding = {id(parameter) for parameter in self.model.get_input_embeddings().parameters()}
        head = {id(parameter) for parameter in self.model.get_output_embeddings().parameters()} - embedding
        return [name for name, parameter in self.named_parameters() if id(parameter) in head]

    def load_weights(self) -> None:
        """Read `weights` into the model. Raises `AssetError` if they are not those of this architecture."""
        if self.weights is None:
            return
        self._remove_tokens()
        given: dict[str, Any] = {"setting": "llm.weights", "config": self.numbers}
        if not load_inside(self.model, self.weights, side="text", **given):
            self.model = load_pretrained(self.model, self.weights, declared=(r"rotary_emb\.inv_freq$",), **given)
        self._add_tokens()

    def _remove_tokens(self) -> None:
        """Without the rows of new tokens, the model is again what its weights know."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if isinstance(embedding, ExtendedEmbedding):
            self.model.set_input_embeddings(embedding.base)
        if isinstance(head, ExtendedHead):
            self.model.set_output_embeddings(head.base)

    def _add_tokens(self) -> None:
        from transformers import GenerationConfig

        # Settings shipped with weights are often invalid (temperature without sampling) and abort the final save.
        self.model.generation_config = GenerationConfig()
        self.response_dropout.add_to(self)
        if self.new_tokens:
            embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
            extended = ExtendedEmbedding(embedding, self.new_tokens)
            tied = head.weight is embedding.weight
            self.model.set_input_embeddings(extended)
            if self.predict_new_tokens:
                head = ExtendedHead(head, self.new_tokens, extended.new_embeddings if tied else None)
                self.model.set_output_embeddings(head)

    def _check_position_axes(self, axes: int) -> None:
        """Raise `ConfigError` unless the model's rotations have several axes."""
        if self.position_axes == 1:
            raise ConfigError(
                f"llm.config.model_type: {self.numbers.get('model_type')!r} has 1 position axis, but the media layout "
                f"gives {axes}; choose a model with M-RoPE (rope_parameters.mrope_section) or another layout"
            )

    def _find_layers(self) -> nn.ModuleList | None:
        return next((getattr(self.decoder, name) for name in LAYER_LISTS if hasattr(self.decoder, name)), None)

    def _check_mask(self, mask: Tensor | SequenceMask) -> None:
        config, name = self.model.config, self.numbers["model_type"]
        if self.unmasked_mixers:
            raise ConfigError(
                f"llm.config.model_type: {name!r} has {', '.join(self.unmasked_mixers)}, which no mask reaches: "
                "samples of a packed row, or independent annotations, would see each other. Use data.pack=null (and a "
                "larger batch.micro) and data.annotations=dialogue, first or drawn, or another model."
            )
        if unknown := self.layer_kinds - MASKED_LAYERS:
            raise ConfigError(
                f"llm.config.layer_types: {', '.join(sorted(unknown))} can take neither sequences nor an explicit mask"
            )
        if isinstance(mask, SequenceMask) and not self.takes_packed:
            raise ConfigError(f"llm.attention: {config._attn_implementation} takes no sequences; choose packed")


def scale_logits(logits: Tensor, config: Any) -> Tensor:
    """Logits as the model's family scales and soft-caps them behind the head."""
    if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * factor
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / divisor
    if (factor := getattr(config, "lm_head_multiplier", None)) is not None:  # Falcon-H1
        logits = logits * factor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
        logits = torch.tanh(logits / cap) * cap
    return logits
