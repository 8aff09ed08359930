"""The language models of Qwen2-VL and Qwen2.5-VL with a head: `transformers` has them only inside the whole models."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPreTrainedModel, Qwen2_5_VLTextModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLPreTrainedModel, Qwen2VLTextModel


class _WithHead(GenerationMixin):
    """A decoder of class `decoder_class`, and the logits of its hidden states."""

    decoder_class: type[nn.Module]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - the library's own form

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model: Any = self.decoder_class(config)
        self.lm_head: Any = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Token ids `[B, T]` or embeddings `[B, T, D]` -> logits `[B, T, V]`, of the last tokens if so told."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **options,
        )
        logits: Any = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)


# The library asks for GenerationMixin among the direct bases of a class that generates.
class Qwen2VLForCausalLM(_WithHead, Qwen2VLPreTrainedModel, GenerationMixin):
    """Qwen2-VL's."""

    config_class = Qwen2VLTextConfig
    decoder_class = Qwen2VLTextModel


class Qwen25VLForCausalLM(_WithHead, Qwen2_5_VLPreTrainedModel, GenerationMixin):
    """Qwen2.5-VL's."""

    config_class = Qwen2_5_VLTextConfig
    decoder_class = Qwen2_5_VLTextModel


def register_qwen_text() -> None:
    """Make `AutoModelForCausalLM` know them."""
    AutoModelForCausalLM.register(Qwen2VLTextConfig, Qwen2VLForCausalLM, exist_ok=True)
    AutoModelForCausalLM.register(Qwen2_5_VLTextConfig, Qwen25VLForCausalLM, exist_ok=True)
