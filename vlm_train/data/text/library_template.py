"""The chat template of a whole model, which writes what stands around its images too."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from data_pipelines.errors import BadSample
from data_pipelines.sample import Text, Turn
from vlm_train.data.text.spans import ContentStyle, MediaPlace, MediaSpan, Span, TextSpan, special_pattern
from vlm_train.data.text.template import TokenizerTemplate
from vlm_train.errors import ConfigError

MARK = re.compile("\ue000([0-9]+)\ue001")


class LibraryTemplate(TokenizerTemplate):
    """The chat template of a processor, given contents in parts, as the library's users give them.

    It is rendered once with a marker in place of every text, as in `TokenizerTemplate`. Where it writes an image, the
    media layout puts the tokens of the image.

    Args:
        system: system message for samples that have none; null: whatever the chat template does by itself.
        media: inline (images stay where they are) | first (to the front of their turn) | drop.
        strip, box, box_scale: see `ContentStyle`.
    """

    def __init__(
        self,
        *,
        system: str | None = None,
        media: MediaPlace = "inline",
        strip: bool = False,
        box: str = "[{:.2f}, {:.2f}, {:.2f}, {:.2f}]",
        box_scale: float = 1.0,
    ) -> None:
        self.system = system
        self.style = ContentStyle(
            media=media, media_prefix="", media_suffix="", strip=strip, box=box, box_scale=box_scale
        )

    def make_spans(self, turns: Sequence[Turn], tokenizer: Any, *, generation: bool = False) -> list[Span]:
        """See `Template`. Raises `BadSample` if the chat template refuses the conversation."""
        if self.system is not None and (not turns or turns[0].role != "system"):
            turns = [Turn(role="system", parts=(Text(text=self.system),)), *turns]
        runs, messages = list[list[TextSpan]](), []
        shown = list[int]()
        for turn in turns:
            content = list[dict[str, str]]()
            before: Any = None
            for span in self.style.make_spans(turn, turn.weight if turn.role == "assistant" else 0.0):
                if isinstance(span, MediaSpan):
                    content.append({"type": "image"})
                    shown.append(span.item)
                elif isinstance(before, TextSpan):
                    runs[-1].append(span)
                else:
                    content.append({"type": "text", "text": f"\ue000{len(runs)}\ue001"})
                    runs.append([span])
                before = span
            messages.append({"role": turn.role, "content": content})
        written = self._render(messages, tokenizer, generation)
        if [int(one) for one in MARK.findall(written)] != [*range(len(runs))]:
            raise BadSample("the model's chat template drops, repeats or moves a part of a turn", kind="template")
        return self._lay_spans(MARK.split(written), runs, shown, tokenizer, _list_expected(messages))

    def _lay_spans(
        self, stretches: list[str], runs: list[list[TextSpan]], shown: list[int], tokenizer: Any, expected: list[int]
    ) -> list[Span]:
        """Literal stretches (even entries) and numbers of texts (odd ones) as spans."""
        special, spans, items = special_pattern(tokenizer), list[Span](), iter(shown)
        weight = 0.0
        for place, stretch in enumerate(stretches):
            if place % 2:
                spans += runs[int(stretch)]
                weight = runs[int(stretch)][-1].weight
                continue
            pieces = stretch.split(tokenizer.media_text)
            if len(pieces) - 1 != expected[place // 2]:
                raise BadSample(
                    "the model's chat template puts images elsewhere than they stand; use template.media=first",
                    kind="template",
                )
            for number, piece in enumerate(pieces):
                if number:
                    spans.append(MediaSpan(next(items)))
                if weight and (end := special.search(piece)):
                    spans += [TextSpan(piece[: end.end()], weight), TextSpan(piece[end.end() :])]
                    weight = 0.0
                else:
                    spans.append(TextSpan(piece))
        return spans

    def answer_end(self, tokenizer: Any) -> str:
        """See `Template`."""
        messages = [{"role": role, "content": [{"type": "text", "text": f"\ue000{number}\ue001"}]} for number, role in
                    enumerate(("user", "assistant"))]  # fmt: skip
        after = MARK.split(self._render(messages, tokenizer, False))[-1]
        end = special_pattern(tokenizer).search(after)
        return after[: end.end()] if end else ""

    def check_tokenizer(self, tokenizer: Any) -> None:
        """See `Template`."""
        if getattr(tokenizer, "media_text", None) is None:
            raise ConfigError(
                "template: it writes images as the processor of a whole model does; use tokenizer=library"
            )
        super().check_tokenizer(tokenizer)

    def _render(self, messages: list[dict[str, Any]], tokenizer: Any, generation: bool) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))
        except (TemplateError, TypeError) as error:
            raise BadSample(f"the model's chat template refuses the conversation: {error}", kind="template") from error


def _list_expected(messages: list[dict[str, Any]]) -> list[int]:
    """Images before, between and behind the texts of a conversation."""
    counts = [0]
    for message in messages:
        for part in message["content"]:
            if part["type"] == "image":
                counts[-1] += 1
            else:
                counts.append(0)
    return counts
