"""Response dropout: as written out, at answers alone, and the same however a layer is computed."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.jobs import train_on_ranks
from tests.support.small_run import command, make_data, train
from tests.support.tiny_models import assert_close, llama_config, text_stream, tiny_llm
from tests.training.strategies.test_resume import job, log
from vlm_train.config.compose import compose_config
from vlm_train.config.run_identity import training_hash
from vlm_train.contracts.batch import IGNORE, TokenStream
from vlm_train.errors import ConfigError, Interrupted
from vlm_train.models.layers.activation_checkpointing import checkpoint_layers
from vlm_train.models.layers.passes import decode_stream, generate_from
from vlm_train.models.llms.hf import HFCausalLM

RATE = 0.3
SMALL = llama_config(hidden_size=32, intermediate_size=48)
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "opt": {"model_type": "opt", "dropout": 0.0},
    "gemma2": {"model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8},
    "olmo2": {"model_type": "olmo2"},
    "glm4": {"model_type": "glm4", "head_dim": 8, "pad_token_id": None},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4},
}
ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14]]
LEARNED = 2
"""Positions from here on predict an answer."""


def make(rate: float = RATE, **changes: Any) -> HFCausalLM:
    torch.manual_seed(0)
    attention = "eager" if changes.get("model_type") == "gemma2" else "sdpa"
    llm = tiny_llm(SMALL | changes, attention=attention, response_residual_dropout=rate)
    with torch.no_grad():
        for parameter in llm.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return llm.train()


def stream() -> TokenStream:
    return text_stream(ROWS, learn_from=LEARNED)


def run(llm: HFCausalLM, text: TokenStream | None = None, seed: int = 1) -> torch.Tensor:
    text = text or stream()
    torch.manual_seed(seed)
    return decode_stream(llm, llm.embed(text.ids), text)


def gradients(llm: HFCausalLM) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in llm.named_parameters() if p.grad is not None}


def write_out(llm: HFCausalLM, text: TokenStream) -> torch.Tensor:
    """A Llama's layers, line by line, with Molmo's rule: numbers of a branch are kept with a probability of the
    position, and divided by it."""
    decoder: Any = llm.decoder
    learned = (text.labels != IGNORE)[..., None]
    keep = torch.where(learned, 1 - RATE, 1.0)

    def drop(branch: torch.Tensor) -> torch.Tensor:
        drawn = torch.empty_like(branch).bernoulli_(1 - RATE)
        return branch * torch.where(learned, drawn, 1.0) / keep

    hidden = llm.embed(text.ids)
    turns = decoder.rotary_emb(hidden, text.positions[0])
    for layer in decoder.layers:
        branch, _ = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=turns, attention_mask=None)
        hidden = hidden + drop(branch)
        hidden = hidden + drop(layer.mlp(layer.post_attention_layernorm(hidden)))
    return decoder.norm(hidden)


def test_it_is_what_molmo_writes() -> None:
    llm, plain, seen = make(), make(0.0), torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    found = run(llm)
    torch.manual_seed(1)
    expected = write_out(plain, stream())
    assert_close(found[seen], expected[seen])
    weight = torch.randn(expected[seen].shape, generator=torch.Generator().manual_seed(2))
    (found[seen] * weight).sum().backward()
    (expected[seen] * weight).sum().backward()
    assert len(gradients(llm)) > 15
    for name, gradient in gradients(plain).items():
        assert_close(gradients(llm)[name], gradient, name)


def test_nothing_is_dropped_in_evaluation_or_without_answers() -> None:
    llm, plain = make(), make(0.0)
    assert not plain.response_dropout and not plain.layers[0].mlp._forward_hooks  # off: no hook, no other forward
    assert "forward" not in vars(plain.layers[0])
    assert torch.equal(run(llm.eval()), run(plain.eval()))
    nothing = text_stream(ROWS, learn_from=99)
    assert torch.equal(run(llm.train(), nothing), run(plain.train(), nothing))
    prompt = text_stream([[5, 6, 7]])
    run(llm)
    settings: dict[str, Any] = {"max_new_tokens": 3, "eos_ids": []}  # in training mode, after a pass that dropped
    assert torch.equal(*(generate_from(one, one.embed(prompt.ids), prompt, **settings) for one in (llm, plain)))


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_only_answers_change(attention: str) -> None:
    """Two samples in a row: what comes before an answer, the second sample's question included, stays to the bit."""
    text = text_stream([[*range(5, 17)]], segments=[[1] * 6 + [2] * 6], positions=[[*range(6)] * 2])
    labels = text.labels.clone()
    labels[0, [0, 1, 2, 6, 7, 8]] = IGNORE
    text = replace(text, labels=labels)
    llm, plain = (tiny_llm(SMALL, attention=attention, response_residual_dropout=rate).train() for rate in (RATE, 0.0))
    plain.load_state_dict(llm.state_dict())
    same = (run(llm, text) == run(plain, text)).all(dim=-1)[0]
    assert same.tolist() == ([True] * 3 + [False] * 3) * 2  # what comes after an answer sees it


@pytest.mark.parametrize("name", MODELS)
def test_every_branch_of_every_model_is_dropped(name: str) -> None:
    """With all of both branches dropped, the layers hand on what they get, at answers alone."""
    llm = make(1 - 1e-7, **MODELS[name])
    states: list[torch.Tensor] = []
    llm.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: states.append((args or (kwargs["hidden_states"],))[0]), with_kwargs=True
    )
    llm.layers[-1].register_forward_hook(lambda _, args, out: states.append(out[0] if isinstance(out, tuple) else out))
    run(llm)
    same, seen = (states[0] == states[1]).all(dim=-1), stream().segment_ids != 0
    assert torch.equal(same[seen], (stream().labels != IGNORE)[seen])


@pytest.mark.parametrize("selective", [False, True])
def test_layers_that_are_computed_again_drop_the_same(selective: bool) -> None:
    """Two passes with other answers before the first backward."""
    plain, again = make(), make()
    checkpoint_layers(again.layers, selective=selective)
    for llm in (plain, again):
        other = text_stream(ROWS, learn_from=4)
        (run(llm)[..., :8].sum() + run(llm, other, seed=2)[..., 8:].sum()).backward()
    assert len(gradients(plain)) > 15
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradients(again)[name], gradient), name


def test_weights_that_are_read_and_copies_keep_it(tmp_path: Path) -> None:
    llm = make()
    llm.model.save_pretrained(tmp_path)
    read = tiny_llm(SMALL, attention="sdpa", response_residual_dropout=RATE, weights=str(tmp_path))
    read.load_weights()
    assert torch.equal(run(read.train()), run(llm))
    copied = copy.deepcopy(llm)
    copied.response_dropout.rate = 0.9
    assert not torch.equal(run(copied), run(llm)) and torch.equal(run(read), run(llm))


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_wrong_rates_are_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match=r"llm\.response_residual_dropout: got .*; allowed: 0, or a probability"):
        make(rate)


def test_layers_of_other_branches_are_refused() -> None:
    with pytest.raises(ConfigError, match="response_residual_dropout: JambaMambaDecoderLayer has no branches"):
        make(model_type="jamba", use_mamba_kernels=False)


def test_runs_without_it_keep_their_names(tmp_path: Path) -> None:
    options = command(tmp_path, tmp_path)
    hashes = [
        training_hash(compose_config([*options, *(f"+llm.response_residual_dropout={rate}" for rate in more)]))
        for more in ((), (0.0,), (RATE,))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_the_same(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    options = [f"+llm.response_residual_dropout={RATE}", "params=all", "data.workers=0", "trainer.export=false"]
    stop = ["allow_targets=[tests.]", "+callbacks.stop={_target_: tests.support.audit.Stop, after: 3}"]
    whole = train(command(data, tmp_path / "runs", *options, name="whole"))
    with pytest.raises(Interrupted):
        train(command(data, tmp_path / "runs", *options, *stop, name="part"))
    part = train(command(data, tmp_path / "runs", *options, name="part"))
    ends = [load_file(run / "checkpoints" / "step-00000006" / "weights.safetensors") for run in (whole, part)]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_sharded_layers_drop_the_same(strategy: str, tmp_path: Path) -> None:
    """Two ranks, packed rows, layers that are computed again: the losses of DDP, whose ranks draw the same."""
    data = make_data(tmp_path / "data")
    options = [f"+llm.response_residual_dropout={RATE}", "trainer.max_steps=3"]
    runs = [
        job(one, data, tmp_path, "packed", one, *options, f"trainer.activation_checkpointing={again}")
        for one, again in (("ddp", "none"), (strategy, "full"))
    ]
    train_on_ranks(*runs, limit=400)
    rows = [log(tmp_path / one) for one in ("ddp", strategy)]
    losses = [[row["loss"] for row in one if row["split"] == "train"] for one in rows]
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-5)
