"""Two real ranks of a contrastive loss: the value and the gradients of the same global batch on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.objectives.test_contrastive import captions, two_tower
from tests.support import ranks
from tests.support.tiny_models import assert_close
from vlm_train.contracts.objective import StepContext
from vlm_train.models.families.two_tower import TwoTower
from vlm_train.objectives.contrastive import Contrastive
from vlm_train.objectives.sigmoid import Sigmoid
from vlm_train.training.gather import RankGather

OBJECTIVES = {
    "contrastive": Contrastive(),
    "contrastive-duplicates": Contrastive(mask_duplicates=True),
    "sigmoid": Sigmoid(),
    "sigmoid-duplicates": Sigmoid(mask_duplicates=True),
}
CUTS = (1, 2)  # pairs of the first rank, of four
CHUNKS = (None, 1)

Found = dict[str, torch.Tensor]


def model_for(name: str, chunk: int | None) -> TwoTower:
    model = two_tower()
    model.cache_chunk = chunk
    if name.startswith("sigmoid"):
        model.logit_bias = torch.nn.Parameter(torch.tensor(-2.0))
    return model


def loss_and_gradients(name: str, chunk: int | None, first: int, last: int, context: StepContext) -> Found:
    model = model_for(name, chunk)
    (loss,) = OBJECTIVES[name](model, captions(first, last), context).values()
    loss.sum.backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.sum.detach(), **gradients}


def rank(number: int, folder: Path) -> None:
    """Every case on this rank; the sums over ranks go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    context = StepContext(RankGather(torch.device("cpu")))
    found = {}
    for name in OBJECTIVES:
        for cut in CUTS:
            for chunk in CHUNKS:
                one = loss_and_gradients(name, chunk, 0 if number == 0 else cut, cut if number == 0 else 4, context)
                for tensor in one.values():
                    dist.all_reduce(tensor)
                found[f"{name}-{cut}-{chunk}"] = one
    if number == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    folder = tmp_path_factory.mktemp("ranks")
    processes = [ranks._server.Process(target=rank, args=(number, folder)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(ranks.LIMIT)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0]
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_ranks_equal_one(found: dict[str, Found], name: str, cut: int, chunk: int | None) -> None:
    expected = loss_and_gradients(name, None, 0, 4, StepContext())
    summed = found[f"{name}-{cut}-{chunk}"]
    assert summed.keys() == expected.keys() and len(expected) > 20
    assert_close(summed["loss"], expected["loss"])
    largest = max(gradient.abs().max() for key, gradient in expected.items() if key != "loss")
    for key, gradient in expected.items():
        if gradient.abs().max() > 1e-6 * largest:
            assert_close(summed[key], gradient, key, tolerance=3e-5)
