"""Over-long samples are cut between turns: nothing is lost, nothing learned twice, and no image cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.sample import Media, Text, Turn
from tests.data.test_datamodule import data, write
from tests.data.text.rendering import assistant, layout, load, sample, user
from tests.support.render import render_sample
from vlm_train.data.order.mixture import SampleRef
from vlm_train.data.text.split import NoPiece, split_annotations
from vlm_train.data.text.streams import IGNORE
from vlm_train.data.text.tokenizer import byte_level


def dialogue(rounds: int, *, system: bool = False) -> tuple[Turn, ...]:
    turns = [Turn(role="system", parts=(Text(text="Be brief."),))] if system else []
    for number in range(rounds):
        turns += [user(f"Question {number}?", *([0] if number == 0 else [])), assistant(f"Answer {number}.")]
    return tuple(turns)


def rendered(item: Any, limit: int, piece: int = 0) -> Any:
    return render_sample(
        item,
        load("qa"),
        byte_level(),
        layout,
        annotations="independent",
        max_length=limit,
        over_length="split",
        piece=piece,
    )


def learned(stream: Any) -> str:
    return bytes(byte_level().decode([t for t in stream.labels.tolist() if t != IGNORE]), "utf-8").decode()


def all_pieces(item: Any, limit: int) -> list[Any]:
    found = []
    while True:
        try:
            found.append(rendered(item, limit, len(found)))
        except NoPiece:
            return found


def test_a_conversation_is_cut_between_rounds_and_learned_whole() -> None:
    item = sample(dialogue(6), media=1)
    whole = rendered(item, 10_000).llm
    assert len(all_pieces(item, 10_000)) == 1
    cut = all_pieces(item, 80)
    assert len(cut) > 1 and all(len(piece.llm) <= 80 for piece in cut)
    assert "".join(learned(piece.llm) for piece in cut) == learned(whole)
    assert all(piece.media == (0,) and len(piece.llm.slots) == 1 for piece in cut)  # each sees the image, whole
    assert all(piece.llm.slots[0].slot.count == whole.slots[0].slot.count for piece in cut)


def test_independent_annotations_are_kept_together_as_far_as_they_fit() -> None:
    item = sample(*((user(f"Q{n}?", 0), assistant(f"A{n}.")) for n in range(5)), media=1)
    one = len(rendered(item, 10_000).llm)
    cut = all_pieces(item, one - 1)
    assert [max(piece.llm.attention_group) for piece in cut] == [4, 0]
    assert sum(piece.llm.supervised for piece in cut) == rendered(item, 10_000).llm.supervised


def test_a_round_that_fits_nowhere_is_left_out() -> None:
    turns = (user("A?", 0), assistant("a"), user("B?"), assistant("b" * 500), user("C?"), assistant("c"))
    cut = all_pieces(sample(turns, media=1), 60)
    assert [learned(piece.llm).strip()[0] for piece in cut] == ["a", "c"]
    with pytest.raises(BadSample, match="sample .* no round of its turns .* data.max_length=20") as caught:
        rendered(sample(turns[2:4], media=0), 20)
    assert caught.value.kind == "too_long"


def test_pieces_begin_with_the_system_turn_and_what_was_shown() -> None:
    found = split_annotations(
        sample(dialogue(4, system=True), media=1).annotations, lambda tried: len(tried[0].turns) <= 5
    )
    assert [len(one[0].turns) for one in found] == [5, 5] and len({one[0].turns[0] for one in found}) == 1
    assert [sum(isinstance(p, Media) for t in one[0].turns for p in t.parts) for one in found] == [1, 1]


def test_pieces_are_samples_of_their_own(tmp_path: Path) -> None:
    long, short = [dialogue(6)], [(user("Q?", 0), assistant("a"))]
    made = data(
        write(tmp_path / "set", long, short, long, pictures=1),
        max_length=80,
        over_length="split",
        cache=str(tmp_path / "lengths"),
    )
    count = len(all_pieces(sample(dialogue(6), media=1), 80))
    assert len(made.train) == 2 * count + 1
    keys = [key for batch in made.train_dataloader() for row in batch.keys for key in row][: 2 * count + 1]
    assert keys == ["k0"] * count + ["k1"] + ["k2"] * count
    assert made.train.sources[0].pieces is not None
    made.train.sources[0].pieces[0, 1] = 99  # as if code of another day had measured
    with pytest.raises(DataError, match=r"k0.* no piece 99: the code that renders .* data\.cache") as caught:
        made.train.load_example(SampleRef(0, 0), training=True)
    assert not isinstance(caught.value, BadSample)  # which would only be left out
