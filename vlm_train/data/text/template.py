"""Conversation templates: turns -> a list of spans that say what is text, what is learned and where media go.

A template is data: the strings around each role. It never tokenizes; `vlm_train.data.text.tokenize` does, once per
stretch of text, and reads from the spans which characters are learned.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from data_pipelines.errors import BadSample
from data_pipelines.sample import Text, Turn
from vlm_train.data.text.spans import ContentStyle, MediaPlace, MediaSpan, Span, TextSpan, special_pattern
from vlm_train.errors import ConfigError


class Template(Protocol):
    """What the renderer needs of a template. `bos`: start with the tokenizer's bos token, if it has one; `style`: how
    it writes the parts of a turn."""

    bos: bool
    style: ContentStyle

    def make_spans(self, turns: Sequence[Turn], tokenizer: Any, *, generation: bool = False) -> list[Span]:
        """The conversation as spans; with `generation`, `turns` ends before an answer, whose prompt follows."""
        ...

    def answer_end(self, tokenizer: Any) -> str:
        """The learned text after an answer: a model that writes it has ended its answer. Empty: there is none."""
        ...

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise `ConfigError` if the tokenizer lacks what the template writes."""
        ...


class ChatTemplate:
    """A template made of fixed strings. `{bos}` and `{eos}` in them stand for the tokenizer's tokens.

    A conversation reads, with the learned text in capitals: start system_prefix system system_suffix, then for every
    exchange user_prefix question user_suffix assistant_prefix ANSWER_LEAD ANSWER ASSISTANT_SUFFIX, joined by
    `separator`; behind the last answer CONVERSATION_END.

    Args:
        system: default system message; null: none, and no system strings. A sample's own system turn replaces it.
        bos: start with the tokenizer's bos token, if it has one.
        start: text before everything.
        system_in_user: the system message stands inside the first user turn (Llama-2).
        answer_lead: what stands between the prompt and the answer and is generated with it (a space, for tokenizers
            that glue it to the first word).
        lead_given: `answer_lead` is learned, but a prompt for an answer ends with it.
        answer_apart: tokenize every answer by itself, not together with the prompt before it (MiniGPT-4).
        separator: text between an answer and the next user turn; not learned.
        conversation_end: what is learned behind the last answer.
        user_text: false leaves the questions out and keeps only their media.
        special: tokens that the strings rely on; the tokenizer must have each as one token.
        media, media_prefix, media_suffix, media_suffix_alone, several_prefix, views, strip, box, box_scale,
            caption_words, keep_end: see `ContentStyle`.
    """

    def __init__(
        self,
        *,
        system: str | None = None,
        bos: bool = True,
        start: str = "",
        system_prefix: str = "",
        system_suffix: str = "",
        system_in_user: bool = False,
        user_prefix: str = "",
        user_suffix: str = "",
        assistant_prefix: str = "",
        answer_lead: str = "",
        lead_given: bool = False,
        answer_apart: bool = False,
        assistant_suffix: str = "",
        separator: str = "",
        conversation_end: str = "",
        user_text: bool = True,
        special: Sequence[str] = (),
        media: MediaPlace = "first",
        media_prefix: str = "",
        media_suffix: str = "\n",
        media_suffix_alone: str | None = None,
        several_prefix: str = "",
        views: Mapping[str, str] | None = None,
        strip: bool = False,
        box: str = "[{:.2f}, {:.2f}, {:.2f}, {:.2f}]",
        box_scale: float = 1.0,
        caption_words: int | None = None,
        keep_end: bool = False,
    ) -> None:
        self.system, self.bos, self.start, self.system_in_user = system, bos, start, system_in_user
        self.system_prefix, self.system_suffix = system_prefix, system_suffix
        self.user_prefix, self.user_suffix, self.user_text = user_prefix, user_suffix, user_text
        self.assistant_prefix, self.assistant_suffix = assistant_prefix, assistant_suffix
        self.answer_lead, self.lead_given, self.separator = answer_lead, lead_given, separator
        self.conversation_end = conversation_end
        self.answer_apart, self.special = answer_apart, tuple(special)
        self.style = ContentStyle(
            media=media, media_prefix=media_prefix, media_suffix=media_suffix, media_suffix_alone=media_suffix_alone,
            several_prefix=several_prefix, views=dict(views or {}), strip=strip, box=box, box_scale=box_scale,
            caption_words=caption_words, keep_end=keep_end,
        )  # fmt: skip
        if lead_given and not answer_lead:
            raise ConfigError("template.lead_given: true, but there is no template.answer_lead that could be given")

    def make_spans(self, turns: Sequence[Turn], tokenizer: Any, *, generation: bool = False) -> list[Span]:
        """See `Template`. Raises `BadSample` for a system turn that is not the first."""
        system: list[Span] = [] if self.system is None else [TextSpan(self.system, content=True)]
        if turns and turns[0].role == "system":
            system, turns = self.style.make_spans(turns[0]), turns[1:]
        if any(turn.role == "system" for turn in turns):
            raise BadSample("a system turn must be the first turn", kind="template")
        if system:
            system = [TextSpan(self.system_prefix), *system, TextSpan(self.system_suffix)]
        spans, in_user = ([], system) if self.system_in_user else (system, [])
        spans = [TextSpan(self.start), *spans] if self.start else spans
        answered = False
        for turn in turns:
            if turn.role == "user":
                asked = self.style.make_spans(turn, text=self.user_text)
                front = [span for span in asked if isinstance(span, MediaSpan)] if self.style.media == "front" else []
                spans += [TextSpan(self.separator if answered else ""), *front, TextSpan(self.user_prefix), *in_user]
                spans += [*asked[len(front) :], TextSpan(self.user_suffix)]
                in_user = []
            else:
                spans += [
                    TextSpan(self.assistant_prefix),
                    TextSpan(self.answer_lead, turn.weight, apart=self.answer_apart),
                ]
                spans += [*self.style.make_spans(turn, turn.weight), TextSpan(self.assistant_suffix, turn.weight)]
            answered = turn.role == "assistant"
        if answered and self.conversation_end and not generation:
            spans.append(TextSpan(self.conversation_end, turns[-1].weight))
        if generation:
            spans += [TextSpan(self.assistant_prefix), *([TextSpan(self.answer_lead)] if self.lead_given else [])]
        for number, span in enumerate(spans):
            if isinstance(span, MediaSpan):
                before, after = (_fill_tokens(text, tokenizer) for text in (span.before, span.after))
                spans[number] = replace(span, before=before, after=after)
            elif not span.content and "{" in span.text:
                spans[number] = replace(span, text=_fill_tokens(span.text, tokenizer))
        return spans

    def answer_end(self, tokenizer: Any) -> str:
        """See `Template`."""
        return _fill_tokens(self.assistant_suffix, tokenizer)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """See `Template`."""
        known = tokenizer.get_vocab()
        problems = [
            f"template.special: {token!r} is not in the tokenizer's vocabulary; choose another template or tokenizer"
            for token in self.special
            if token not in known
        ]
        own = {**vars(self), **vars(self.style)}
        strings = (v for k, v in own.items() if isinstance(v, str) and k != "system")
        if tokenizer.eos_token is None and any("{eos}" in text for text in strings):
            problems.append("template: writes {eos}, but the tokenizer has no eos token")
        if problems:
            raise ConfigError(problems)


def _fill_tokens(text: str, tokenizer: Any) -> str:
    return text.replace("{bos}", tokenizer.bos_token or "").replace("{eos}", tokenizer.eos_token or "")


class TokenizerTemplate:
    """The tokenizer's own `chat_template`.

    It is rendered once with a marker in place of every turn, so the places of the turns are known exactly whatever the
    template writes around them, and the turns' text can never be read as template. Learned: every answer and what the
    template writes after it, up to and including the first special token.

    Args:
        system: system message for samples that have none; null: whatever the chat template does by itself.
        media, media_prefix, media_suffix, strip, box, box_scale: see `ContentStyle`.
    """

    bos = False  # the chat template writes it

    def __init__(
        self,
        *,
        system: str | None = None,
        media: MediaPlace = "first",
        media_prefix: str = "",
        media_suffix: str = "\n",
        strip: bool = False,
        box: str = "[{:.2f}, {:.2f}, {:.2f}, {:.2f}]",
        box_scale: float = 1.0,
    ) -> None:
        self.system = system
        self.style = ContentStyle(
            media=media,
            media_prefix=media_prefix,
            media_suffix=media_suffix,
            strip=strip,
            box=box,
            box_scale=box_scale,
        )

    def make_spans(self, turns: Sequence[Turn], tokenizer: Any, *, generation: bool = False) -> list[Span]:
        """See `Template`. Raises `BadSample` if the chat template refuses the conversation."""
        if self.system is not None and (not turns or turns[0].role != "system"):
            turns = [Turn(role="system", parts=(Text(text=self.system),)), *turns]
        literals = self._find_literals(turns, tokenizer, generation)
        special = special_pattern(tokenizer)
        spans: list[Span] = [TextSpan(literals[0])]
        for index, (turn, literal) in enumerate(zip(turns, literals[1:], strict=True)):
            weight = turn.weight if turn.role == "assistant" else 0.0
            spans += self.style.make_spans(turn, weight)
            end = special.search(literal) if turn.role == "assistant" else None
            if end is None:
                spans.append(TextSpan(literal))
            elif index == len(turns) - 1 and not generation:
                spans.append(TextSpan(literal[: end.end()], weight))  # nothing after the last learned token matters
            else:
                spans += [TextSpan(literal[: end.end()], weight), TextSpan(literal[end.end() :])]
        return spans

    def answer_end(self, tokenizer: Any) -> str:
        """See `Template`: up to and including the first special token behind an answer."""
        ask = Turn(role="user", parts=(Text(text="a"),))
        answer = Turn(role="assistant", parts=(Text(text="b"),))
        after = self._find_literals([ask, answer], tokenizer, False)[-1]
        end = special_pattern(tokenizer).search(after)
        return after[: end.end()] if end else ""

    def check_tokenizer(self, tokenizer: Any) -> None:
        """See `Template`."""
        if not tokenizer.chat_template:
            raise ConfigError("template: the tokenizer has no chat template of its own; choose a named template")
        if not self.answer_end(tokenizer):
            raise ConfigError(
                "template: the tokenizer's chat template closes an answer with no special token, so a model could "
                "never learn to stop; choose a named template"
            )

    def _find_literals(self, turns: Sequence[Turn], tokenizer: Any, generation: bool) -> list[str]:
        """What the chat template writes before, between and after the turns: `len(turns) + 1` strings."""
        from jinja2.exceptions import TemplateError

        marks = [f"\ue000{index}\ue001" for index in range(len(turns))]
        messages = [{"role": turn.role, "content": mark} for turn, mark in zip(turns, marks, strict=True)]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        except TemplateError as error:
            raise BadSample(
                f"the tokenizer's chat template refuses the conversation: {error}", kind="template"
            ) from error
        if re.findall("\ue000[0-9]+\ue001", text) != marks:
            raise BadSample(
                "the tokenizer's chat template drops or repeats a turn of the conversation", kind="template"
            )
        return re.split("\ue000[0-9]+\ue001", text)
