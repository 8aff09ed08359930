"""Alpaca instructions, text only: a JSON list, or JSON Lines, of `{"instruction", "input", "output"}`.

Source: github.com/tatsu-lab/stanford_alpaca, alpaca_data.json; its prompts are PROMPT_DICT of train.py.
"""

from __future__ import annotations

from data_pipelines.errors import BadSample
from data_pipelines.sample import Sample
from data_pipelines.sources import FileSource
from data_pipelines.sources.common.conversations import refuse_media
from data_pipelines.sources.common.samples import check_choice, make_exchange, make_sample

PROMPTS = ("stanford", "plain")
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


class Alpaca(FileSource):
    """One sample per record of `file`, with one question and its answer.

    `prompt` composes the question. stanford: the published prompt, one with and one without `input`. plain: the
    instruction, and after an empty line the input, for models whose own chat template says who speaks.
    """

    layouts = ("alpaca",)

    def __init__(
        self,
        *,
        file: str,
        prompt: str = "stanford",
        name: str = "alpaca",
        license: str = "",
        split: str = "train",
        limit: int | None = None,
    ) -> None:
        self.name, self.license, self.split = name, license, split
        self.prompt = check_choice("prompt", prompt, PROMPTS)
        super().__init__(file, limit)

    def read_record(self, i: int) -> tuple[Sample, list[bytes]]:
        """Record i of the file."""
        record = self.raw[i]
        refuse_media(record)
        instruction, context, output = record["instruction"], record.get("input"), record["output"]
        for name, text in (("instruction", instruction), ("output", output)):
            if not isinstance(text, str) or not text.strip():
                raise BadSample(f"has no {name}")
        if context is None or context != context:  # pandas writes NaN where there is none
            context = ""
        if not isinstance(context, str):
            raise BadSample(f"its input is {context!r:.80}, not text")
        if self.prompt == "plain":
            ask = "\n\n".join(filter(None, (instruction, context)))
        else:
            ask = (WITH_INPUT if context else WITHOUT_INPUT).format(instruction=instruction, input=context)
        return make_sample(self, self.make_key(i, record), [], [make_exchange(ask, output, items=())])
