"""States of an optimizer are those of what learned when they were written."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from vlm_train.checkpoint import files
from vlm_train.checkpoint.pieces import Piece
from vlm_train.checkpoint.state import _Reader, piece_key
from vlm_train.errors import CheckpointError


def test_what_did_not_learn_before_is_named(tmp_path: Path) -> None:
    """Else a layer that was unfrozen would go on with states of zero, or with none."""
    held = Piece("layer.weight", "exp_avg", 0, torch.ones(4), owned=True)
    files.write_tensors(tmp_path / files.optimizer_file(0, 1), {piece_key(held): held.tensor})
    files.write_tensors(tmp_path / files.WEIGHTS, {"layer.weight": torch.ones(4)})
    with ExitStack() as stack:
        reader = _Reader(tmp_path, stack)
        same, new = (Piece(name, "exp_avg", 0, torch.zeros(4), owned=True) for name in ("layer.weight", "new.weight"))
        reader.fill_piece(same)
        assert torch.equal(same.tensor, held.tensor)
        with pytest.raises(
            CheckpointError, match=r"holds 0 of 4 numbers of new\.weight .*What learns must be what lea"
        ):
            reader.fill_piece(new)
