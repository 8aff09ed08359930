"""The optimizer's states out of the pieces that any number of processes wrote, under any strategy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from vlm_train.checkpoint.files import WEIGHTS
from vlm_train.checkpoint.pieces import WEIGHT, Piece
from vlm_train.errors import CheckpointError

_KEY = re.compile(r"(.+)\|([^|]+)\|(\d+)")


def piece_key(piece: Piece) -> str:
    """Under which a piece is written: parameter | kind | first element."""
    return f"{piece.name}|{piece.kind}|{piece.start}"


def collect_owned(pieces: Iterator[Piece]) -> dict[str, Tensor]:
    """The tensors that this process writes, by the key of their piece, in the order of the keys: a resumed optimizer
    holds its states in another order, and its files are to be the same."""
    owned = sorted((one for one in pieces if one.owned), key=piece_key)
    return {piece_key(one): one.tensor[0] if one.single else one.tensor for one in owned}


def restore_pieces(strategy: Any, named: dict[str, nn.Parameter], folder: Path) -> None:
    """Fill what this process holds of the optimizer's states, and of the exact weights behind 16-bit ones.

    Raises:
        CheckpointError: the checkpoint lacks a part of it.
    """
    with ExitStack() as stack:
        reader = _Reader(folder, stack)
        strategy.allocate_state(reader.kinds)
        for piece in strategy.pieces(named):
            reader.fill_piece(piece)


@dataclass(frozen=True)
class _Stored:
    """A piece in a file: elements start .. start + size of the flattened whole."""

    file: Any
    key: str
    shape: tuple[int, ...]
    start: int
    size: int


class _Reader:
    """All pieces of a checkpoint. Only the requested ones are read."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.stored: dict[tuple[str, str], list[_Stored]] = {}
        self.kinds: dict[str, bool] = {}
        for path in sorted(folder.glob("optimizer-*.safetensors")):
            file = stack.enter_context(safe_open(path, "pt"))
            for name in file.keys():  # noqa: SIM118
                if (found := _KEY.fullmatch(name)) is None:
                    raise CheckpointError(
                        f"{path}: {name!r} is not a piece of ours: <parameter>|<kind>|<first element>"
                    )
                parameter, kind, start = found.groups()
                self._add_stored(file, name, (parameter, kind), int(start))
                single = not file.get_slice(name).get_shape()  # so is every state of a parameter without dimensions
                self.kinds[kind] = single and self.kinds.get(kind, True)
        file = stack.enter_context(safe_open(folder / WEIGHTS, "pt"))
        for name in file.keys():  # noqa: SIM118
            self._add_stored(file, name, (name, WEIGHT), 0)

    def _add_stored(self, file: Any, name: str, of: tuple[str, str], start: int) -> None:
        shape = tuple(file.get_slice(name).get_shape())
        size = 1
        for length in shape:
            size *= length
        self.stored.setdefault(of, []).append(_Stored(file, name, shape, start, size))

    def fill_piece(self, piece: Piece) -> None:
        """Copy what overlaps from everything that is stored of it."""
        end, filled = piece.start + len(piece.tensor), 0
        for one in self.stored.get((piece.name, piece.kind), ()):
            first, last = max(piece.start, one.start), min(end, one.start + one.size)
            if first < last:
                values = _read_elements(one, first - one.start, last - one.start)
                piece.tensor[first - piece.start : last - piece.start].copy_(values)
                filled += last - first
        if filled != len(piece.tensor):
            raise CheckpointError(
                f"{self.folder}: holds {filled} of {len(piece.tensor)} numbers of {piece.name} ({piece.kind}) from "
                f"{piece.start} on. What learns must be what learned when it was written; to start from its weights "
                "use init_from."
            )


def _read_elements(one: _Stored, first: int, last: int) -> Tensor:
    """Elements first .. last of a stored piece, of a tensor with several dimensions only the rows they lie in."""
    if len(one.shape) < 2:
        tensor: Tensor = (
            one.file.get_tensor(one.key).view(-1) if not one.shape else one.file.get_slice(one.key)[first:last]
        )
        return tensor
    row = one.size // one.shape[0]
    rows: Tensor = one.file.get_slice(one.key)[first // row : -(-last // row)]
    return rows.reshape(-1)[first - first // row * row :][: last - first]
