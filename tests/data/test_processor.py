"""The processor: one object that makes what a model reads, the same in every process, and reads what it answers."""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
from pathlib import Path

import pytest

from tests.data.text.rendering import load
from tests.support.small_run import make_data
from vlm_train.build import build_assembly, build_data
from vlm_train.config.compose import compose_config, compose_tiny
from vlm_train.contracts.batch import Batch
from vlm_train.contracts.layout import NoMedia
from vlm_train.data.datamodule import VLMData
from vlm_train.data.loader import WindowStream
from vlm_train.data.order.cost import Cost
from vlm_train.data.processor import Processor
from vlm_train.data.text.template import TokenizerTemplate
from vlm_train.data.text.tokenizer import byte_level

RECORDED = {
    "llava15_stage2": {"llm": ([4, 235], "3d4b9d74ed13040d")},
    "instructblip_flant5xl": {
        "llm": ([4, 23], "0b6e047e9646b752"),
        "decoder": ([4, 26], "3310a4a2d7f9b4fc"),
        "qformer": ([4, 18], "f49f8c2683d4e759"),
    },
    "blip2_stage1": {"llm": ([4, 35], "dbb5041fcaaa5291")},
}
"""Shape and hash of every stream of a first batch (ids, labels, weights), from before there was a processor."""


def data_of(recipe: str, root: Path) -> VLMData:
    """The data of a small recipe, in order."""
    options = ["data.shuffle=none", "batch.samples=4", "batch.micro=4", f"paths.data={make_data(root)}"]
    options += ["template.caption_words=null"] if recipe == "blip2_stage1" else []  # captions were not cleaned then
    cfg = compose_config([f"recipe={recipe}", "size=tiny", "init_from=[]", *options])
    return build_data(cfg, build_assembly(cfg, meta=True).processor)


def first_batch(data: VLMData) -> Batch:
    plan = data.make_plan(batch=4, tokens=None, epochs=1, most=None, world=1, cost=Cost())
    (batch,) = WindowStream(data.train, plan, 0, 0, "token").load_window(0)
    return batch


def summarize(batch: Batch) -> dict[str, tuple[list[int], str]]:
    return {
        name: (
            list(stream.ids.shape),
            hashlib.sha256(
                b"".join(one.numpy().tobytes() for one in (stream.ids, stream.labels, stream.weights))
            ).hexdigest()[:16],
        )
        for name, stream in batch.text.items()
    }


def send_summary(data: VLMData, queue: multiprocessing.SimpleQueue) -> None:
    """What a process that inherits nothing makes of the data that it is given."""
    queue.put(summarize(first_batch(data)))


@pytest.mark.parametrize("recipe", RECORDED)
def test_batches_are_those_recorded(recipe: str, tmp_path: Path) -> None:
    assert summarize(first_batch(data_of(recipe, tmp_path))) == RECORDED[recipe]


def test_a_spawned_process_makes_the_same_batch(tmp_path: Path) -> None:
    """Q-Former streams included: tokenizer, template, layout, image plan and instruction all travel."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=send_summary, args=(data_of("instructblip_flant5xl", tmp_path), queue))
    process.start()
    found = queue.get()
    process.join()
    assert process.exitcode == 0 and found == RECORDED["instructblip_flant5xl"]


def test_a_pickled_processor_holds_no_weights() -> None:
    processor = build_assembly(compose_tiny("recipe=llava15_stage2", "init_from=[]")).processor
    data = pickle.dumps(processor)
    assert b"torch" not in data and len(data) < 200_000
    again = pickle.loads(data)
    assert again.end_ids == processor.end_ids and again.images["vision"].size == (32, 32)


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        ("qa", []),
        ("llama2", []),
        ("plain", ["\n"]),
        ("caption_opt", ["\n"]),
        ("chatml", ["<|im_end|>"]),
        ("minigpt4", []),
    ],
)
def test_answers_end_as_their_template_ends_them(template: str, ends: list[str]) -> None:
    """A line break is a token; "###" is three, and none ends an answer."""
    tokenizer = byte_level()
    wanted = [tokenizer(end, add_special_tokens=False)["input_ids"] for end in ends]
    processor = Processor(tokenizer=tokenizer, template=load(template), layout=NoMedia())
    assert processor.end_ids == [tokenizer.eos_token_id, *(token for (token,) in wanted)]


@pytest.mark.parametrize(
    ("template", "written", "answer"),
    [("minigpt4", "a cat###Human: what", "a cat"), ("qa", "a #cat<eos> ###", "a #cat"), ("plain", "a cat\nb", "a cat")],
)
def test_an_answer_ends_where_the_template_ends_it(template: str, written: str, answer: str) -> None:
    tokenizer = byte_level()
    processor = Processor(tokenizer=tokenizer, template=load(template), layout=NoMedia())
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    assert processor.decode_answer(ids).strip() == answer


def test_the_tokenizers_own_template_ends_answers_with_its_token() -> None:
    """It is not the tokenizer's end of text, and generation stops at it too."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|turn_end|>\n{% endfor %}"
    end = tokenizer.convert_tokens_to_ids("<|turn_end|>")
    processor = Processor(tokenizer=tokenizer, template=TokenizerTemplate(), layout=NoMedia())
    assert processor.end_ids == [tokenizer.eos_token_id, end]
    ids = tokenizer("a cat", add_special_tokens=False)["input_ids"]
    assert processor.decode_answer([*ids, end, *ids]) == "a cat"
