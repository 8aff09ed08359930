"""Alpaca instructions, text only: a JSON list, or JSON Lines, of `{"instruction", "input", "output"}`.

Source: github.com/tatsu-lab/stanford_alpaca, alpaca_data.json; its prompts are PROMPT_DICT of train.py.
"""

from __future__ import annotations

from pathlib import Path

from data_pipelines.errors import BadSample, DataError
from data_pipelines.sample import Annotation, Sample, Text, Turn
from data_pipelines.sources import ListSource
from data_pipelines.sources.files import place, read_records

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


class Alpaca(ListSource):
    """One sample per record of `file`, with one question and its answer.

    `prompt` composes the question. stanford: the published prompt, one with and one without `input`. plain: the
    instruction, and after an empty line the input, for models whose own chat template says who speaks.
    """

    def __init__(
        self,
        *,
        file: str,
        prompt: str = "stanford",
        name: str = "alpaca",
        licence: str = "",
        split: str = "train",
    ) -> None:
        if prompt not in PROMPTS:
            raise DataError(f"prompt: got {prompt!r}; allowed: {', '.join(PROMPTS)}")
        self.name, self.licence, self.split, self.prompt = name, licence, split, prompt
        self._records = read_records(Path(file))

    def __len__(self) -> int:
        return len(self._records)

    def label(self, i: int) -> str:
        """The record's line or number."""
        return place(self._records, i)

    def record(self, i: int) -> tuple[Sample, list[bytes]]:
        """Record i of the file."""
        record = self._records[i]
        instruction, context, output = str(record["instruction"]), record.get("input") or "", record["output"]
        if not isinstance(output, str) or not output.strip():
            raise BadSample("has no output")
        if self.prompt == "plain":
            question = "\n\n".join(filter(None, (instruction, context)))
        else:
            question = (WITH_INPUT if context else WITHOUT_INPUT).format(instruction=instruction, input=context)
        turns = (
            Turn(role="user", parts=(Text(text=question),)),
            Turn(role="assistant", parts=(Text(text=output),)),
        )
        annotations = (Annotation(turns=turns),)
        return Sample(key=f"{i:07d}", annotations=annotations, source=self.name, licence=self.licence), []
