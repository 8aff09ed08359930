"""HFCausalLM against `transformers`: heads, masks, windows, new tokens, weights."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.support.tiny_models import assert_close, llama_config, text_stream, tiny_llm
from vlm_train.errors import AssetError, ConfigError
from vlm_train.models.layers.activation_checkpointing import checkpoint_layers
from vlm_train.models.layers.passes import decode_stream, generate_from

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 60}
MIXED = ["sliding_attention", "full_attention"]
FAMILIES = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    "qwen2 with windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 3,
        "max_window_layers": 1,
    },
    "mistral window": {"model_type": "mistral", "sliding_window": 3},
    "gemma2 soft cap": {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 0.5, "sliding_window": 3},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 3, "layer_types": MIXED},
    "granite scale": {"model_type": "granite", "logits_scaling": 4.0},
    "cohere scale": {"model_type": "cohere", "logit_scale": 0.3},
    "phi": {"model_type": "phi"},
    "opt": {"model_type": "opt", "dropout": 0.0},
    "opt 350m": {"model_type": "opt", "dropout": 0.0, "do_layer_norm_before": False, "word_embed_proj_dim": 24},
}
ROWS = [[5, 6, 7, 8, 9, 10, 11], [3, 4, 5, 6]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_library_for_padded_rows(family, attention):
    torch.manual_seed(0)
    try:
        llm = tiny_llm(SMALL | FAMILIES[family], attention=attention).eval()
    except ConfigError as error:  # recent releases refuse soft-capped attention scores with sdpa
        assert "'gemma2' with attention 'sdpa'" in str(error)
        return
    with torch.no_grad():
        for parameter in llm.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    stream = text_stream(ROWS)
    token_mask = stream.segment_ids != 0
    expected = llm.model(input_ids=stream.ids, attention_mask=token_mask.long()).logits
    logits = llm.head(decode_stream(llm, llm.embed(stream.ids), stream))
    assert_close(logits[token_mask], expected[token_mask], family)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_causal_rows_need_no_mask(family, attention):
    """Logits and gradients of the real positions are those of the explicit mask, whatever stands in the padding."""
    torch.manual_seed(0)
    try:
        llm = tiny_llm(SMALL | FAMILIES[family], attention=attention).train()
    except ConfigError:  # see above
        return
    with torch.no_grad():
        for parameter in llm.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    stream = text_stream(ROWS)
    token_mask = stream.segment_ids != 0
    wave = torch.randn(int(token_mask.sum()), llm.vocab_size)
    results = []
    for one in (stream, replace(stream, plain_causal=True, ids=stream.ids + 9 * ~token_mask)):
        llm.zero_grad()
        logits = llm.head(decode_stream(llm, llm.embed(one.ids), one))[token_mask]
        (logits * wave).sum().backward()
        results.append((logits, {n: p.grad.clone() for n, p in llm.named_parameters()}))
    (masked, masked_grads), (plain, plain_grads) = results
    assert_close(plain, masked, family)
    for name, gradient in plain_grads.items():
        if not name.endswith("k_proj.bias"):  # zero in exact arithmetic
            assert_close(gradient, masked_grads[name], name)


def test_plain_causal_rows_leave_sdpa_its_fast_kernels(monkeypatch):
    """No mask reaches the kernel, and the library does not ask the device whether positions look packed."""
    from transformers import masking_utils

    seen, kernel = [], torch.nn.functional.scaled_dot_product_attention

    def record(*args, attn_mask=None, is_causal=False, **options):
        seen.append((attn_mask is None, is_causal))
        return kernel(*args, attn_mask=attn_mask, is_causal=is_causal, **options)

    def guess(position_ids):
        raise AssertionError("guessed")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", guess)
    llm, stream = tiny_llm().train(), replace(text_stream(ROWS), plain_causal=True)
    decode_stream(llm, llm.embed(stream.ids), stream)
    assert seen == [(True, True)] * 2
    assert masking_utils.find_packed_sequence_indices is guess


def test_position_axes_reach_models_that_have_them(monkeypatch):
    llm, stream = tiny_llm(), text_stream([[5, 6, 7]])
    three = replace(stream, positions=torch.tensor([[0, 1, 1], [0, 1, 2], [0, 2, 1]])[:, None])
    with pytest.raises(ConfigError, match=r"'llama' has 1 position axis, but the media layout gives 3"):
        decode_stream(llm, llm.embed(stream.ids), three)
    given = []
    monkeypatch.setattr(llm, "position_axes", 3)
    monkeypatch.setattr(llm.decoder, "forward", lambda **kw: given.append(kw) or SimpleNamespace(last_hidden_state=0))
    decode_stream(llm, llm.embed(stream.ids), three)
    assert given[0]["position_ids"] is three.positions


def test_placeholders_embed_to_something_finite():
    assert torch.isfinite(tiny_llm().embed(torch.tensor([[-200, 3]]))).all()


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_may_be_only_read(tied, tmp_path):
    """Rows of the embedding that have no logits (Molmo2), also after the weights of the base were read."""
    tiny_llm(llama_config(tie_word_embeddings=tied)).model.save_pretrained(tmp_path)
    given = {"weights": str(tmp_path), "new_tokens": 3, "predict_new_tokens": False}
    llm = tiny_llm(llama_config(tie_word_embeddings=tied), **given)
    llm.load_weights()
    assert (llm.vocab_size, llm.base_vocab_size) == (97, 97)
    hidden = llm.embed(torch.tensor([[1, 97, 99]]))
    assert hidden.shape == (1, 3, 48) and llm.head(hidden).shape == (1, 3, 97)
    assert [name for name, _ in llm.named_parameters() if "new" in name] == ["model.model.embed_tokens.new_embeddings"]
    assert bool(llm.head_parameters()) == (not tied)


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_are_parameters_of_their_own(tied):
    torch.manual_seed(0)
    llm = tiny_llm(llama_config(tie_word_embeddings=tied), new_tokens=3)
    table = llm.model.get_input_embeddings().weight.detach()
    new = {name: p for name, p in llm.named_parameters() if "new_" in name}
    assert len(new) == (1 if tied else 2) and all(p.shape == (3, 48) for p in new.values())
    ids = torch.tensor([[5, 97, 99, 96]])
    embeds = llm.embed(ids)
    assert torch.equal(embeds[0, 0], table[5]) and torch.equal(embeds[0, 3], table[96])
    assert_close(embeds[0, 1], table.mean(dim=0))
    assert llm.head(embeds).shape == (1, 4, llm.vocab_size) and llm.vocab_size == 100
    for name, parameter in llm.named_parameters():
        parameter.requires_grad_(name in new)
    llm.head(llm.embed(ids))[..., 98].sum().backward()
    grads = {name: parameter.grad for name, parameter in llm.named_parameters() if parameter.grad is not None}
    assert set(grads) == set(new) and all(g[1].any() or g[0].any() for g in grads.values())


def test_a_new_token_can_be_generated_and_read_again():
    llm = tiny_llm(new_tokens=1).eval()
    stream = text_stream([[5, 6]])
    with torch.no_grad():  # the head always prefers the new token
        llm.model.lm_head.base.weight.zero_()
        hidden = decode_stream(llm, llm.embed(stream.ids), stream)
        llm.model.lm_head.new_head.copy_(hidden[0, -1:])
    out = generate_from(llm, llm.embed(stream.ids), stream, max_new_tokens=2, eos_ids=[])
    assert out[0, 0] == 97


def test_generation_stops_at_the_end_token_and_fills_up():
    torch.manual_seed(1)
    llm = tiny_llm().eval()
    stream = text_stream(ROWS)
    free = generate_from(llm, llm.embed(stream.ids), stream, max_new_tokens=5, eos_ids=[])
    eos = int(free[0, 1])
    stopped = generate_from(llm, llm.embed(stream.ids), stream, max_new_tokens=5, eos_ids=[eos])
    first = free[0].tolist().index(eos)
    assert stopped[0, : first + 1].tolist() == free[0, : first + 1].tolist()
    assert set(stopped[0, first:].tolist()) == {eos}


def test_generation_has_a_least_length_and_avoids_repetition():
    torch.manual_seed(1)
    llm = tiny_llm().eval()
    stream = text_stream([[5, 6]])
    embeds = llm.embed(stream.ids)
    first = int(generate_from(llm, embeds, stream, max_new_tokens=1, eos_ids=[])[0, 0])
    longer = generate_from(llm, embeds, stream, max_new_tokens=6, min_new_tokens=4, eos_ids=[first])[0].tolist()
    assert first not in longer[:4]
    for penalty, varied in ((1e-6, False), (1e6, True)):
        found = generate_from(llm, embeds, stream, max_new_tokens=6, eos_ids=[], repetition_penalty=penalty)[0].tolist()
        assert (len(set(found)) == len(found)) == varied


def test_vocabulary_comes_from_the_tokenizer_if_open():
    assert tiny_llm(llama_config(vocab_size=None), vocab_size=33).vocab_size == 33
    assert tiny_llm(vocab_size=33).vocab_size == 97
    with pytest.raises(ConfigError, match="llm.config.vocab_size"):
        tiny_llm(llama_config(vocab_size=None))


def test_refusals_name_the_setting():
    with pytest.raises(ConfigError, match="llm.attention: 'quick'; allowed: packed, flash, flex, sdpa, eager"):
        tiny_llm(attention="quick")
    with pytest.raises(ConfigError, match="did you mean 'num_hidden_layers'"):
        tiny_llm(llama_config(num_hiden_layers=2))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_of_a_folder(tmp_path, tied, device):
    saved = tiny_llm(llama_config(tie_word_embeddings=tied))
    saved.model.save_pretrained(tmp_path)
    with torch.device(device):
        llm = tiny_llm(llama_config(tie_word_embeddings=tied), weights=str(tmp_path), new_tokens=1)
    llm.load_weights()
    stream = text_stream(ROWS)
    logits = [m.head(decode_stream(m, m.embed(stream.ids), stream)) for m in (saved, llm)]
    assert torch.equal(logits[0], logits[1][..., :97])
    assert not any(parameter.is_meta for parameter in llm.parameters())


def test_weights_with_another_rope_base_are_refused(tmp_path):
    tiny_llm().model.save_pretrained(tmp_path)
    other = llama_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with pytest.raises(AssetError, match="rope_parameters"):
        tiny_llm(other, weights=str(tmp_path)).load_weights()


def write_gguf(llm, path):
    """The model as llama.cpp writes it: its names, and rotary halves interleaved in the query and key projections."""
    gguf = pytest.importorskip("gguf")
    config = llm.model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, value in llm.model.state_dict().items():
        array = value.numpy()
        for projection, count in heads.items():
            if projection in key:
                halves = array.reshape(count, 2, array.shape[0] // count // 2, *array.shape[1:])
                array = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
        writer.add_tensor(names.get_name(key.removesuffix(".weight")) + ".weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_weights_of_a_gguf_file(tmp_path):
    saved = tiny_llm()
    write_gguf(saved, str(tmp_path / "model.gguf"))
    llm = tiny_llm(weights=str(tmp_path / "model.gguf"))
    llm.load_weights()
    stream = text_stream(ROWS)
    logits = [m.head(decode_stream(m, m.embed(stream.ids), stream)) for m in (saved, llm)]
    assert_close(logits[1], logits[0])


def test_checkpointed_layers_compile():
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(2)))
    x = torch.randn(3, 4)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    checkpoint_layers(model)
    torch.compile(model, backend="aot_eager")(x).square().sum().backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        assert_close(p.grad, grad)
