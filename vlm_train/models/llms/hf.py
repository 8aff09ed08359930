"""Any `transformers` causal language model, taken apart into embed, decode and head.

Legend: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlm_train.contracts.cross_states import CrossStates
from vlm_train.data.batch import Segments
from vlm_train.errors import ConfigError
from vlm_train.models.attention import PACKED, given_segments, register_packed
from vlm_train.models.hub import ATTENTION, build_model, load_pretrained, with_vocabulary
from vlm_train.models.layers.inserted_blocks import BlockInserter, MakeBlock
from vlm_train.models.llms.new_tokens import ExtendedEmbedding, ExtendedHead


@contextmanager
def _no_guessed_packing() -> Iterator[None]:
    """Keep the library from reading packed sequences out of position ids where it is given no mask.

    Its guess asks the device, and an explicit mask follows from it where kernels would do without one. What is packed
    is known: it comes with segments or an explicit mask.
    """
    from transformers import masking_utils

    guess = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = guess


class HFCausalLM(nn.Module):
    """A causal language model built from `config`; images enter as embeddings.

    Args:
        config: `{model_type, ...}`, the fields of the `transformers` configuration;
            `vocab_size: null` takes the length of the tokenizer.
        weights: hub name, local folder or `*.gguf` file, read by `load_weights`; None: random.
        vocab_size: length of the tokenizer.
        new_tokens: rows beyond the base vocabulary, as parameters of their own (`new_embeddings`, `new_head`).
        attention: `packed` (as `sdpa`, but packed samples each by themselves), `sdpa` or `eager`.
    """

    def __init__(
        self,
        *,
        config: Mapping[str, Any],
        weights: str | None = None,
        vocab_size: int | None = None,
        new_tokens: int = 0,
        attention: str = PACKED,
    ) -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM

        self.numbers = with_vocabulary(config, vocab_size)
        self.weights = weights
        self.new_tokens = new_tokens
        self.inserter = BlockInserter()
        register_packed()
        self.model = build_model(AutoModelForCausalLM, "llm", self.numbers, attention, (PACKED, *ATTENTION))
        if self.takes_segments and not (self.model._supports_sdpa and self.model.is_backend_compatible()):
            other = "sdpa" if self.model._supports_sdpa else "eager"
            raise ConfigError(f"llm.attention: {self.numbers['model_type']!r} cannot run packed; choose {other}")
        self.dim = self.model.get_input_embeddings().weight.shape[1]
        self.base_vocab_size = self.model.get_input_embeddings().weight.shape[0]
        self.vocab_size = self.base_vocab_size + new_tokens
        self._add_tokens()

    @property
    def decoder(self) -> nn.Module:
        """The model without its head."""
        return self.model.get_decoder()

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder blocks."""
        for name in ("layers", "h", "blocks"):
            if hasattr(self.decoder, name):
                return getattr(self.decoder, name)
        raise ConfigError(f"llm.config.model_type: {type(self.decoder).__name__} does not expose its layers")

    @property
    def takes_segments(self) -> bool:
        """Whether `decode` takes segments in place of a mask."""
        return self.model.config._attn_implementation == PACKED

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
        mask: Tensor | Segments | None,
        *,
        cross_states: CrossStates | None = None,
    ) -> Tensor:
        """Embeddings `[B, T, D]`, positions `[A, B, T]`, mask `[B, 1, T, T]` (True = attend) -> hidden `[B, T, D]`.

        Without a mask attention is plain causal and positions count from 0 (padding on the right does no harm then);
        with segments the same is true of each of them. Fast kernels run only so. The inserted blocks read
        `cross_states`.
        """
        segments = mask if isinstance(mask, Segments) else None
        with self.inserter.given(cross_states), given_segments(segments), _no_guessed_packing():
            output = self.decoder(
                inputs_embeds=embeds,
                attention_mask=None if mask is None else self._library_mask(mask, positions[0], embeds.dtype),
                position_ids=None if mask is None else self._library_positions(positions),
                use_cache=False,
            )
        return output.last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states `[..., D]` -> logits `[..., V]`, scaled and soft-capped as the model's family does."""
        config = self.model.config
        logits = self.model.get_output_embeddings()(hidden)
        if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * factor
        if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / divisor
        if (factor := getattr(config, "lm_head_multiplier", None)) is not None:  # Falcon-H1
            logits = logits * factor
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
            logits = torch.tanh(logits / cap) * cap
        return logits

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
        cross_states: CrossStates | None = None,
    ) -> Tensor:
        """Continue prompts with a key-value cache.

        Args:
            embeds: `[B, T, D]` prompt embeddings, padded on the LEFT.
            mask: `[B, T]`, True at real tokens.
            temperature: 0 is greedy.
            repetition_penalty, min_new_tokens: as in `Sampling`; the penalty does not see the prompt.
            cross_states: as in `decode`, for the tokens of the padded prompts.

        Returns:
            `[B, up to max_new_tokens]` new token ids; a row that ended is filled up with its end-of-text token.
        """
        from transformers import GenerationConfig

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
            return self.model.generate(inputs_embeds=embeds, attention_mask=mask.long(), generation_config=settings)

    def head_parameters(self) -> list[str]:
        """Names of the parameters that only `head` reads (none where it shares the embedding's)."""
        embedding = {id(parameter) for parameter in self.model.get_input_embeddings().parameters()}
        head = {id(parameter) for parameter in self.model.get_output_embeddings().parameters()} - embedding
        return [name for name, parameter in self.named_parameters() if id(parameter) in head]

    def load_weights(self) -> None:
        """Read `weights` into the model. Raises `AssetError` if they are not those of this architecture."""
        if self.weights is not None:
            self.model = load_pretrained(
                self.model,
                self.weights,
                setting="llm.weights",
                declared=(r"rotary_emb\.inv_freq$",),
                config=self.numbers,
            )
            self._add_tokens()

    def _add_tokens(self) -> None:
        from transformers import GenerationConfig

        # Settings shipped with weights are often invalid (temperature without sampling) and abort the final save.
        self.model.generation_config = GenerationConfig()
        if self.new_tokens:
            embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
            extended = ExtendedEmbedding(embedding, self.new_tokens)
            tied = head.weight is embedding.weight
            self.model.set_input_embeddings(extended)
            self.model.set_output_embeddings(
                ExtendedHead(head, self.new_tokens, extended.new_embeddings if tied else None)
            )

    def _library_positions(self, positions: Tensor) -> Tensor:
        """Positions `[A, B, T]` in the form the library takes: `[B, T]`, or all axes where its rotations have as many.

        Raises `ConfigError` for several axes and a model that has one.
        """
        if len(positions) == 1:
            return positions[0]
        rotary = getattr(self.model.config, "rope_parameters", None) or {}
        if "mrope_section" not in rotary:
            raise ConfigError(
                f"llm.config.model_type: {self.numbers.get('model_type')!r} has 1 position axis, but the media layout "
                f"gives {len(positions)}; choose a model with M-RoPE (rope_parameters.mrope_section) or another layout"
            )
        return positions

    def _library_mask(self, mask: Tensor | Segments, positions: Tensor, dtype: torch.dtype) -> Any:
        """Our mask in the form the library takes as is: boolean for sdpa, additive for eager, one per kind of layer.

        None in place of segments, which packed attention gets by itself. Raises `ConfigError` where a kind of layer, or
        the attention, cannot take them.
        """
        config = self.model.config
        kinds = set(getattr(config, "layer_types", None) or ())
        if unknown := kinds - {"full_attention", "sliding_attention"}:
            raise ConfigError(
                f"llm.config.layer_types: {', '.join(sorted(unknown))} can take neither segments nor an explicit mask"
            )
        if isinstance(mask, Segments):
            if not self.takes_segments:
                raise ConfigError(f"llm.attention: {config._attn_implementation} takes no segments; choose packed")
            return None
        window = getattr(config, "sliding_window", None)
        near = mask
        if window is not None:
            near = mask & (positions[:, None, :, None] - positions[:, None, None, :] < window)
        if config._attn_implementation == "eager":
            mask, near = (
                torch.zeros(m.shape, dtype=dtype, device=m.device).masked_fill(~m, torch.finfo(dtype).min)
                for m in (mask, near)
            )
        if not kinds:
            return near
        return {"full_attention": mask, "sliding_attention": near}
