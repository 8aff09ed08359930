"""Generation step by step: which tokens may be drawn, how often, and when a row ends."""

from __future__ import annotations

import torch

from vlm_train.models.layers.generate import Sampling, generate_tokens

LOGITS = torch.log(torch.tensor([0.05, 0.5, 0.3, 0.15]))


def drawn(logits: torch.Tensor = LOGITS, rows: int = 4000, eos_ids=(), **sampling) -> torch.Tensor:
    torch.manual_seed(0)
    ids = torch.zeros(rows, 1, dtype=torch.long)
    options = Sampling(**{"max_new_tokens": 1} | sampling)
    return generate_tokens(lambda ids, token_mask: logits.expand(len(ids), -1).clone(), ids, ids == 0, options, eos_ids)


def test_nucleus_holds_the_fewest_likely_tokens() -> None:
    for top_p, kept in ((1.0, [0, 1, 2, 3]), (0.9, [1, 2, 3]), (0.8, [1, 2]), (0.5, [1])):
        found = drawn(temperature=1.0, top_p=top_p)
        assert sorted(set(found.flatten().tolist())) == kept
        shares = LOGITS.exp()[kept] / LOGITS.exp()[kept].sum()
        assert torch.allclose(torch.bincount(found.flatten(), minlength=4)[kept] / 4000, shares, atol=0.03)


def test_temperature_sharpens() -> None:
    share = (drawn(temperature=0.5) == 1).float().mean().item()
    assert abs(share - (LOGITS / 0.5).softmax(dim=0)[1].item()) < 0.03
    assert set(drawn(temperature=0.0).flatten().tolist()) == {1}


def test_tokens_that_are_there_become_less_likely() -> None:
    logits = torch.tensor([2.0, 3.0, 2.9, -1.0])
    assert drawn(logits, 1, max_new_tokens=4, repetition_penalty=1.1).tolist() == [[1, 2, 1, 1]]
    assert drawn(torch.tensor([-1.0, -1.05]), 1, repetition_penalty=1.1).tolist() == [[1]], "the prompt's 0 counts"


def test_padding_is_not_repeated() -> None:
    ids, token_mask = torch.tensor([[5, 0, 0], [0, 5, 6]]), torch.tensor([[True, False, False], [False, True, True]])
    logits = torch.tensor([1.0, 0.95, 0.0, 0.0, 0.0, 0.0, 0.0])
    options = Sampling(max_new_tokens=1, repetition_penalty=1.1)
    assert generate_tokens(lambda *_: logits.expand(2, -1).clone(), ids, token_mask, options, ()).tolist() == [[0], [0]]


def test_rows_end_but_not_too_early() -> None:
    def following(ids: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(2, 4)
        logits[0, 3], logits[1, 3 if ids.shape[1] > 3 else 2] = 1.0, 1.0
        return logits

    ids = torch.zeros(2, 1, dtype=torch.long)
    found = generate_tokens(following, ids, ids == 0, Sampling(max_new_tokens=9), [3])
    assert found.tolist() == [[3, 3, 3, 3], [2, 2, 2, 3]]
    found = generate_tokens(following, ids, ids == 0, Sampling(max_new_tokens=9, min_new_tokens=2), [3])
    assert found.tolist() == [[0, 0, 3, 3], [2, 2, 2, 3]]
