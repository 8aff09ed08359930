"""`attention=flash`: its calls of the flash-attn package, against a reference that is written out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.layers.test_packed import (
    PACKS,
    SAMPLES,
    batch_of,
    items_of,
    tiny_model,
    token_losses,
)
from tests.models.vision.test_vision import TOWERS, pixels
from tests.support.tiny_models import assert_close, clip_config, tiny_llm, tiny_vision
from vlm_train.contracts.media import MediaInput
from vlm_train.errors import ConfigError
from vlm_train.models.layers import flash
from vlm_train.models.layers.flash import FlashKernels, find_problem, flash_attention, load_kernels


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, back: int) -> Tensor:
    """One sequence: `[T, H, C]`, twice `[T, K, C]` -> `[T, H, C]`, token by token."""
    shared = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = []
    for t in range(len(q)):
        first = 0 if back < 0 else max(0, t - back)
        seen = slice(first, t + 1) if causal else slice(None)
        heads = []
        for h in range(q.shape[1]):
            scores = (k[seen, h // shared] @ q[t, h]) * scale
            heads.append(torch.softmax(scores, 0) @ v[seen, h // shared])
        out.append(torch.stack(heads))
    return torch.stack(out)


class Reference:
    """Stands in for the package, with the arguments of release 2, and notes what it is called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def dense(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
        causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:  # fmt: skip
        self.calls.append({"kind": "dense", "causal": causal, "shape": tuple(q.shape)})
        assert q.ndim == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2] and dropout_p == 0.0
        rows = zip(q, k, v, strict=True)
        return torch.stack([attend(*row, softmax_scale, causal, window_size[0]) for row in rows])

    def varlen(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:  # fmt: skip
        starts = cu_seqlens_q.tolist()
        self.calls.append({"kind": "varlen", "causal": causal, "starts": starts, "longest": max_seqlen_q})
        assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k) and q.ndim == 3
        lengths = [b - a for a, b in zip(starts, starts[1:], strict=False)]
        assert max_seqlen_q == max_seqlen_k >= max(lengths) and starts[0] == 0 and starts[-1] == len(q)
        parts = [states.split(lengths) for states in (q, k, v)]
        return torch.cat([attend(*one, softmax_scale, causal, window_size[0]) for one in zip(*parts, strict=True)])


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reference]:
    kernels = Reference()
    monkeypatch.setattr(flash, "find_problem", lambda query, value: None)
    monkeypatch.setattr(flash, "load_kernels", lambda: FlashKernels(2, kernels.dense, kernels.varlen))
    yield kernels
    flash._parameters_of.cache_clear()


@pytest.mark.parametrize("llm", ["llama", "mistral window"])
def test_packed_rows_go_through_the_varlen_kernel(llm: str, reference: Reference) -> None:
    """Losses and gradients are those of `packed`, shared key heads, windows and padding included."""
    losses, gradients = [], []
    for attention in ("flash", "packed"):
        model = tiny_model(llm, attention)
        found = token_losses(model, batch_of(items_of(model, SAMPLES), PACKS))
        found.sum().backward()
        losses.append(found.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert_close(losses[0], losses[1])
    assert_close(gradients[0], gradients[1])
    assert {call["kind"] for call in reference.calls} == {"varlen"} and all(call["causal"] for call in reference.calls)
    assert len(reference.calls[0]["starts"]) >= len(SAMPLES) + 1


def test_rows_of_one_sample_go_through_the_dense_kernel(reference: Reference) -> None:
    ids = torch.arange(12).view(2, 6) % 7
    torch.manual_seed(0)
    ours = tiny_llm(attention="flash")
    theirs = tiny_llm(attention="packed")
    theirs.load_state_dict(ours.state_dict())
    positions = torch.arange(6).expand(1, 2, 6)
    one, other = (llm.decode(llm.embed(ids), positions, None) for llm in (ours, theirs))
    assert_close(one, other)
    assert reference.calls and all(call["causal"] and call["kind"] == "dense" for call in reference.calls)
    assert reference.calls[0]["shape"][:2] == (2, 6)  # [B, T, H, C]


@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_sees_both_ways(tower: str, reference: Reference) -> None:
    torch.manual_seed(0)
    ours, theirs = (tiny_vision(TOWERS[tower], attention=one).eval() for one in ("flash", "sdpa"))
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        for parameter in (*ours.parameters(), *theirs.parameters()):
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)  # else every attention is nearly a mean
    one, other = (vision.encode(MediaInput(pixels())).rectangular() for vision in (ours, theirs))
    assert_close(one, other)
    calls = [(call["kind"], call["causal"], call["shape"][0]) for call in reference.calls]
    assert calls and set(calls) == {("dense", False, 2)}


def test_a_tower_with_an_attention_of_its_own_is_refused(reference: Reference) -> None:
    config = clip_config() | {"model_type": "blip_vision_model"}
    with pytest.raises(ConfigError, match=r"vision.attention: 'blip_vision_model' cannot run flash; choose another"):
        tiny_vision(config, attention="flash")


def test_a_release_with_other_arguments_gets_those_it_knows() -> None:
    def release_4(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False) -> Any:
        return attend(q[0], k[0], v[0], softmax_scale, causal, -1)[None], None

    q = torch.randn(1, 3, 2, 8)
    wanted: dict[str, Any] = {"causal": True, "softmax_scale": 0.3, "dropout_p": 0.0}
    assert_close(flash.call_kernel(release_4, q, q, q, **wanted)[0], attend(q[0], q[0], q[0], 0.3, True, -1))
    for lost in ({"dropout_p": 0.1}, {"window_size": (3, 0)}):
        with pytest.raises(ConfigError, match=next(iter(lost))):
            flash.call_kernel(release_4, q, q, q, **(wanted | lost))


def test_what_it_does_not_take_is_said() -> None:
    states = torch.randn(1, 2, 3, 8, requires_grad=True)
    assert "cpu; allowed: a CUDA device" in (find_problem(states, states) or "")
    with pytest.raises(ConfigError, match="attention=flash: got tensors on cpu"):
        flash_attention(torch.nn.Identity(), states, states, states, None)


def test_without_the_package_it_is_said_before_any_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    load_kernels.cache_clear()
    monkeypatch.setattr(flash, "RELEASES", (("no_such_flash_attn", 2, (8, 0)),))
    for build in (tiny_llm, tiny_vision):
        with pytest.raises(ConfigError, match=r"attention=flash: no flash-attn .*no_such_flash_attn.*packed"):
            build(attention="flash")
    load_kernels.cache_clear()


@pytest.mark.gpu
def test_the_installed_kernels_compute_what_the_reference_does() -> None:
    pytest.importorskip("flash_attn")
    kernels, names = load_kernels(), {"device": "cuda", "dtype": torch.bfloat16}
    q, k, v = (torch.randn(9, heads, 64, **names) for heads in (4, 2, 2))
    starts = torch.tensor([0, 4, 9], dtype=torch.int32, device="cuda")
    wanted: dict[str, Any] = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 5, "max_seqlen_k": 5}
    found = flash.call_kernel(kernels.varlen, q, k, v, **wanted, causal=True, softmax_scale=None)
    exact = [states.float() for states in (q, k, v)]
    parts = [[states[a:b] for states in exact] for a, b in ((0, 4), (4, 9))]
    expected = torch.cat([attend(*part, None, True, -1) for part in parts])
    assert (found.float() - expected).abs().max() <= 2e-2 * expected.abs().max()
