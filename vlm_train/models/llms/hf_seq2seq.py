"""Any `transformers` encoder-decoder language model, taken apart into embed, encode, decode and head.

Legend: B rows, S tokens of the encoder, T tokens of the decoder, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlm_train.contracts.batch import SequenceMask
from vlm_train.contracts.parts import Encoded
from vlm_train.errors import ConfigError
from vlm_train.models.llms.new_tokens import ExtendedEmbedding, ExtendedHead
from vlm_train.models.weights.hub import build_model, load_pretrained, with_vocabulary


class HFSeq2Seq(nn.Module):
    """An encoder-decoder language model (T5) built from `config`; images enter the encoder as embeddings.

    Args:
        config: `{model_type, ...}`, the fields of the `transformers` configuration; `vocab_size: null` takes the length
            of the tokenizer. `tie_word_embeddings: false` (T5 v1.1, Flan-T5): the head has weights of its own, and what
            enters it is not scaled. `dense_act_fn` may be another one than the weights were made with: BLIP-2 and
            InstructBLIP run Flan-T5 with gelu in place of gelu_new.
        weights: hub name or local folder, read by `load_weights`; None: random.
        vocab_size: length of the tokenizer.
        new_tokens: rows beyond the base vocabulary, as parameters of their own (`new_embeddings`, `new_head`).
        attention: `sdpa` or `eager`.
    """

    takes_packed = False

    def __init__(
        self,
        *,
        config: Mapping[str, Any],
        weights: str | None = None,
        vocab_size: int | None = None,
        new_tokens: int = 0,
        attention: str = "sdpa",
    ) -> None:
        super().__init__()
        from transformers import AutoModelForSeq2SeqLM

        self.numbers = with_vocabulary(config, vocab_size)
        self.weights = weights
        self.new_tokens = new_tokens
        self.model = build_model(AutoModelForSeq2SeqLM, "llm", self.numbers, attention)
        self.dim = self.model.get_input_embeddings().weight.shape[1]
        self.base_vocab_size = self.model.get_input_embeddings().weight.shape[0]
        self.vocab_size = self.base_vocab_size + new_tokens
        self._add_tokens()

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks of the encoder and then those of the decoder."""
        blocks = []
        for stack in (self.model.get_encoder(), self.model.get_decoder()):
            name = next((name for name in ("block", "layers") if hasattr(stack, name)), None)
            if name is None:
                raise ConfigError(f"llm.config.model_type: {type(stack).__name__} does not expose its layers")
            blocks += list(getattr(stack, name))
        return nn.ModuleList(blocks)

    @property
    def start_id(self) -> int:
        """The token that a decoder's input begins with."""
        config = self.model.config
        start = getattr(config, "decoder_start_token_id", None)
        return int(config.pad_token_id if start is None else start)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids `[B, T]` -> embeddings `[B, T, D]`, for either side; negative ids (placeholders) give token 0's."""
        return self.model.get_input_embeddings()(ids.clamp(min=0))

    def encode(self, embeds: Tensor, mask: Tensor) -> Encoded:
        """Embeddings `[B, S, D]` and mask `[B, 1, 1, S]` (True = a token that all others see)."""
        output = self.model.get_encoder()(inputs_embeds=embeds, attention_mask=self._library_mask(mask, embeds))
        return Encoded(output.last_hidden_state, mask)

    def decode(
        self, embeds: Tensor, positions: Tensor, mask: Tensor | SequenceMask | None, *, encoded: Encoded
    ) -> Tensor:
        """Embeddings `[B, T, D]`, mask `[B, 1, T, T]` (True = attend; None = plain causal) -> hidden `[B, T, D]`.

        Positions are not asked for: these models count tokens themselves.
        """
        del positions
        assert not isinstance(mask, SequenceMask)
        rows, length = embeds.shape[:2]
        seen = encoded.mask.expand(rows, 1, length, encoded.states.shape[1])
        output = self.model.get_decoder()(
            inputs_embeds=embeds,
            attention_mask=None if mask is None else self._library_mask(mask, embeds),
            encoder_hidden_states=encoded.states,
            encoder_attention_mask=self._library_mask(seen, embeds),
            use_cache=False,
        )
        return output.last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states `[..., D]` -> logits `[..., V]`, scaled by D**-0.5 where T5 shares the embedding's weights."""
        if getattr(self.model.config, "scale_decoder_outputs", False):
            hidden = hidden * self.dim**-0.5
        return self.model.get_output_embeddings()(hidden)

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
    ) -> Tensor:
        """Answer prompts with a key-value cache.

        Args:
            embeds: `[B, S, D]` the encoder's embeddings, padded on either side.
            mask: `[B, S]`, True at real tokens.
            temperature: 0 is greedy.
            repetition_penalty, min_new_tokens: as in `Sampling`; the penalty does not see the prompt.

        Returns:
            `[B, up to max_new_tokens]` token ids without the start token; a row that ended is filled up with its
            end-of-text token.
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
            decoder_start_token_id=self.start_id,
            use_cache=True,
            **sampling,
        )
        ids = self.model.generate(inputs_embeds=embeds, attention_mask=mask.long(), generation_config=settings)
        return ids[:, 1:]

    def head_parameters(self) -> list[str]:
        """Names of the parameters that only `head` reads (none where it shares the embedding's)."""
        embedding = {id(parameter) for parameter in self.model.get_input_embeddings().parameters()}
        head = {id(parameter) for parameter in self.model.get_output_embeddings().parameters()} - embedding
        return [name for name, parameter in self.named_parameters() if id(parameter) in head]

    def load_weights(self) -> None:
        """Read `weights` into the model. Raises `AssetError` if they are not those of this architecture."""
        if self.weights is not None:
            self.model = load_pretrained(self.model, self.weights, setting="llm.weights", config=self.numbers)
            self._add_tokens()

    def _add_tokens(self) -> None:
        from transformers import GenerationConfig

        # Settings shipped with weights are often invalid (temperature without sampling) and abort the final save.
        self.model.generation_config = GenerationConfig()
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if self.numbers.get("tie_word_embeddings") is False and head.weight is embedding.weight:
            head.weight = nn.Parameter(embedding.weight.detach().clone())  # `transformers` 5 ties every T5
        if self.new_tokens:
            tied = head.weight is embedding.weight
            extended = ExtendedEmbedding(embedding, self.new_tokens)
            self.model.set_input_embeddings(extended)
            self.model.set_output_embeddings(
                ExtendedHead(head, self.new_tokens, extended.new_embeddings if tied else None)
            )

    def _library_mask(self, mask: Tensor, embeds: Tensor) -> Tensor:
        """Our mask in the form the library takes as is: boolean for sdpa, additive for eager."""
        if self.model.config._attn_implementation != "eager":
            return mask
        lowest = torch.finfo(embeds.dtype).min
        return torch.zeros(mask.shape, dtype=embeds.dtype, device=mask.device).masked_fill(~mask, lowest)
