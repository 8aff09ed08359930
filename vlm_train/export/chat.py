"""A run's conversation template as a Jinja chat template, so that a served prompt has the ids that training had.

The chat template writes the bos token itself, as servers expect, and the exported tokenizer adds none. What cannot be
written this way, or gives other ids than our own renderer, is left out: no template is better than a wrong one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import Formatter
from typing import Any

from data_pipelines.errors import BadSample
from data_pipelines.sample import Annotation, Media, MediaItem, Sample, Text, Turn
from vlm_train.contracts.layout import PLACEHOLDER_ID, MediaSize
from vlm_train.data.processor import Processor
from vlm_train.data.text.render import RenderOptions
from vlm_train.data.text.spans import ContentStyle
from vlm_train.data.text.template import ChatTemplate, TokenizerTemplate

IMAGE_TOKEN = "<image>"


def load_processor(folder: Path) -> Any:
    """The processor of an exported folder, as its users load it."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


@dataclass(frozen=True)
class ServedImages:
    """How the processor of an exported folder reads the images of a text.

    Attributes:
        token: what stands for an image.
        marks: what the processor itself writes before and behind an image.
        load: reads the processor of a folder.
    """

    token: str = IMAGE_TOKEN
    marks: tuple[str, str] = ("", "")
    load: Callable[[Path], Any] = load_processor


def add_chat_template(
    folder: Path, ours: Processor, image_size: MediaSize, served: ServedImages = ServedImages()
) -> str | None:
    """Give the exported processor in `folder` the chat template that reproduces the one of training.

    Args:
        ours: the run's processor.
        image_size: that of the images which are compared.
        served: how the processor in `folder` reads images.

    Returns:
        None, or why the folder has no chat template; its tokenizer then adds the bos token if training did.
    """
    template: Any = ours.template
    tokenizer = ours.tokenizer
    problem: str | None = f"{type(template).__name__} cannot be written as one"
    for jinja in jinja_templates(_leave_out_marks(template, served.marks), tokenizer):
        _save_tokenizer(folder, jinja.replace(IMAGE_TOKEN, served.token), served, add_bos=False)
        problem = find_difference(served.load(folder), ours, image_size)
        if problem is None:
            return None
    given = getattr(template, "lead_given", False) and template.answer_lead == "{bos}"  # behind the image
    _save_tokenizer(folder, None, served, add_bos=(template.bos or given) and tokenizer.bos_token is not None)
    return problem


def _leave_out_marks(template: Any, marks: tuple[str, str]) -> Any:
    """A template without those marks around an image that another one writes."""
    style: ContentStyle | None = getattr(template, "style", None)
    if style is None or not (style.media_prefix.endswith(marks[0]) and style.media_suffix.startswith(marks[1])):
        return template
    prefix, suffix = style.media_prefix.removesuffix(marks[0]), style.media_suffix.removeprefix(marks[1])
    template = copy.copy(template)
    template.style = replace(style, media_prefix=prefix, media_suffix=suffix)
    return template


def describe_chat_template(problem: str | None) -> str:
    """What `add_chat_template` came to, for the terminal."""
    return f"no chat template: {problem}" if problem else "a chat template that gives the prompts of training"


def find_difference(processor: Any, ours: Processor, image_size: MediaSize) -> str | None:
    """Where the exported processor's prompt ids differ from ours, over sample conversations; None: nowhere."""
    from PIL import Image

    if not hasattr(processor, "image_token_id"):
        return f"{type(processor).__name__} puts the image before every text by itself"
    width, height = image_size.width, image_size.height
    for turns in _sample_conversations():
        count = sum(isinstance(part, Media) for turn in turns for part in turn.parts)
        media = tuple(MediaItem(name=f"{item}.png", width=width, height=height) for item in range(count))
        sample = Sample(key="chat", media=media, annotations=(Annotation(turns=turns),))
        try:
            prompt = ours.render(sample, RenderOptions(annotations="first", generation=True)).llm.ids.tolist()
        except BadSample:  # a conversation that the template does not allow
            continue
        expected = [processor.image_token_id if token == PLACEHOLDER_ID else token for token in prompt]
        images = [Image.new("RGB", (width, height)) for _ in range(count)] or None
        try:
            text = processor.apply_chat_template([_make_message(turn) for turn in turns], add_generation_prompt=True)
            found = list(processor(text=text, images=images)["input_ids"][0])
        except Exception as error:  # libraries differ in what they raise, and any of it means the same here
            return f"transformers cannot use it ({type(error).__name__}: {str(error).splitlines()[0]})"
        if found != expected:
            return _first_difference(found, expected, "-".join(turn.role for turn in turns))
    return None


def jinja_templates(template: Any, tokenizer: Any) -> Iterator[str]:
    """Jinja chat templates for `template`, to be tried in order; none if it cannot be written as one.

    Tokenizers that mark the start of a text (sentencepiece) may do so only at its very start, while ours sees every
    stretch between two images as a text of its own. The second form writes the space that makes up for it.
    """
    if type(template) is ChatTemplate:
        body = _chat_template(template, tokenizer)
    elif type(template) is TokenizerTemplate:
        yield _tokenizer_template(template, tokenizer)
        return
    else:
        return
    bos = "{{- bos_token -}}\n" if template.bos and tokenizer.bos_token is not None else ""
    yield f"{bos}{body}"
    yield f"{bos}{{%- set whole -%}}\n{body}\n{{%- endset -%}}\n{_SPACED}"


_SPACED = """{%- for stretch in whole.split('<image>') -%}
{{- '' if loop.first else '<image>' -}}{{- ' ' if stretch and stretch[0] != ' ' else '' -}}{{- stretch -}}
{%- endfor -%}"""


def _chat_template(template: ChatTemplate, tokenizer: Any) -> str:
    """The body of a template of fixed strings: `ChatTemplate.make_spans` in Jinja."""

    def fill_tokens(value: str) -> str:
        return value.replace("{bos}", tokenizer.bos_token or "").replace("{eos}", tokenizer.eos_token or "")

    def quote_filled(value: str) -> str:
        return quote_jinja(fill_tokens(value))

    prefix, suffix = (fill_tokens(value) for value in (template.style.media_prefix, template.style.media_suffix))
    style = replace(template.style, media_prefix=prefix, media_suffix=suffix)
    system_prefix, system_suffix = quote_filled(template.system_prefix), quote_filled(template.system_suffix)
    default = "''" if template.system is None else f"{system_prefix} ~ {quote_jinja(template.system)} ~ {system_suffix}"
    head, in_user = ("", "ns.system ~ ") if template.system_in_user else ("{{- ns.system -}}", "")
    head = f"{{{{- {quote_filled(template.start)} -}}}}{head}" if template.start else head
    question = f"content(message, {'true' if template.user_text else 'false'})"
    front = "front(message) ~ " if style.media == "front" else ""
    user = f"{front}{quote_filled(template.user_prefix)} ~ {in_user}{question} ~ {quote_filled(template.user_suffix)}"
    assistant = quote_filled(template.assistant_prefix)
    prompt = f"{assistant} ~ {quote_filled(template.answer_lead)}" if template.lead_given else assistant
    lead, suffix = quote_filled(template.answer_lead), quote_filled(template.assistant_suffix)
    answer = f"{assistant} ~ {lead} ~ content(message, true) ~ {suffix}"
    return f"""{_content_macro(style)}
{{%- set ns = namespace(system={default}, answered=false) -%}}
{{%- if messages and messages[0]['role'] == 'system' -%}}
{{%- set said = content(messages[0], true) -%}}
{{%- set ns.system = {system_prefix} ~ said ~ {system_suffix} if said else '' -%}}
{{%- set messages = messages[1:] -%}}
{{%- endif -%}}
{head}
{{%- for message in messages -%}}
{{%- if message['role'] == 'user' -%}}
{{{{- {quote_filled(template.separator)} if ns.answered else '' -}}}}{{{{- {user} -}}}}
{{%- set ns.system = '' -%}}
{{%- elif message['role'] == 'assistant' -%}}
{{{{- {answer} -}}}}
{{%- else -%}}
{{{{- raise_exception('roles: a system message first, then user and assistant; got ' ~ message['role']) -}}}}
{{%- endif -%}}
{{%- set ns.answered = message['role'] == 'assistant' -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- {prompt} -}}}}{{%- endif -%}}"""


def _tokenizer_template(template: TokenizerTemplate, tokenizer: Any) -> str:
    """The tokenizer's own chat template, given messages in which images are already text."""
    system = ""
    if template.system is not None:
        first = f"[{{'role': 'system', 'content': {quote_jinja(template.system)}}}]"
        test = "not messages or messages[0]['role'] != 'system'"
        system = f"{{%- if {test} -%}}{{%- set messages = {first} + messages -%}}{{%- endif -%}}\n"
    style = replace(template.style, media="first") if template.style.media == "front" else template.style
    return f"""{_content_macro(style)}
{system}{{%- set ns = namespace(messages=[]) -%}}
{{%- for message in messages -%}}
{{%- set plain = {{'role': message['role'], 'content': content(message, true)}} -%}}
{{%- set ns.messages = ns.messages + [plain] -%}}
{{%- endfor -%}}
{{%- set messages = ns.messages %}}{tokenizer.get_chat_template()}"""


def _content_macro(style: ContentStyle) -> str:
    """Macros in Jinja: `content(message, with_text)` is `ContentStyle.make_spans`, `front(message)` media before it."""
    image, count, numbered = quote_jinja(style.media_prefix + IMAGE_TOKEN + style.media_suffix), "", ""
    if style.several_prefix:
        image, count = f"({_several_prefix(style)} if shown.total > 1 else '') ~ {image}", _COUNT_IMAGES
        numbered = "{%- set shown.number = shown.number + 1 -%}"
    trimmed = {
        "first": "c.media ~ (c.text | trim if c.media or STRIP else c.text)",
        "front": "c.text | trim if c.media or STRIP else c.text",
        "drop": "c.text | trim if STRIP else c.text",
        "inline": f"(c.text | trim if STRIP else c.text) | replace('{IMAGE_TOKEN}', {image})",
    }[style.media].replace("STRIP", "true" if style.strip else "false")
    placed = {
        "first": f"{numbered}{{%- set c.media = c.media ~ {image} -%}}",
        "front": "{%- set c.media = 'before' -%}",
        "drop": "",
    }
    return f"""{count}{{%- macro front(message) -%}}
{{%- for part in message['content'] if part is mapping and part['type'] == 'image' -%}}
{numbered}{{{{- {image} -}}}}
{{%- endfor -%}}
{{%- endmacro -%}}
{{%- macro content(message, with_text) -%}}
{{%- set c = namespace(media='', text='') -%}}
{{%- for part in ([{{'type': 'text', 'text': message['content']}}] if message['content'] is string
    else message['content']) -%}}
{{%- if part['type'] == 'image' -%}}
{placed.get(style.media, f"{{%- set c.text = c.text ~ '{IMAGE_TOKEN}' -%}}")}
{{%- elif part['type'] == 'text' and with_text -%}}
{{%- set c.text = c.text ~ part['text'] -%}}
{{%- endif -%}}
{{%- endfor -%}}
{{{{- {trimmed} -}}}}
{{%- endmacro -%}}"""


_COUNT_IMAGES = """{%- set shown = namespace(total=0, number=0) -%}
{%- for message in messages -%}
{%- for part in message['content'] if part is mapping and part['type'] == 'image' -%}
{%- set shown.total = shown.total + 1 -%}
{%- endfor -%}
{%- endfor -%}
"""


def _several_prefix(style: ContentStyle) -> str:
    """`several_prefix` of the image that was counted last, as an expression in Jinja."""
    counts = {"number": "shown.number", "index": "(shown.number - 1)", None: "''"}
    pieces = Formatter().parse(style.several_prefix)
    return " ~ ".join(f"{quote_jinja(text)} ~ {counts[field]}" for text, field, _, _ in pieces)


def quote_jinja(text: str) -> str:
    """`text` as a Jinja string literal."""
    return "'" + text.encode("unicode_escape").decode("ascii").replace("'", "\\'") + "'"


def _save_tokenizer(folder: Path, jinja: str | None, served: ServedImages, *, add_bos: bool) -> None:
    """Save the tokenizer in `folder` anew with this chat template, or none, and so that it adds bos, or not."""
    for old in ("chat_template.jinja", "chat_template.json"):
        (folder / old).unlink(missing_ok=True)
    tokenizer = served.load(folder).tokenizer
    tokenizer.chat_template = jinja
    if tokenizer.add_eos_token:
        tokenizer.add_eos_token = False
    tokenizer.add_bos_token = add_bos  # also drops whatever else the tokenizer puts around a text
    tokenizer.save_pretrained(folder)


def _sample_conversations() -> Iterator[tuple[Turn, ...]]:
    """One question with an image, several turns with two, a system message, text alone."""
    system, answer = _make_turn("system", "Answer with one word."), _make_turn("assistant", "Red.")
    first, second = _make_turn("user", "What color is it?", 0), _make_turn("user", "And is that one yes or no?", 1)
    yield (first,)
    yield first, answer, second
    yield system, first
    yield (_make_turn("user", "What is a square?"), answer, _make_turn("user", "Is it round?"))


def _make_turn(role: Any, text: str, *items: int) -> Turn:
    return Turn(role=role, parts=(*(Media(item=item) for item in items), Text(text=text)))


def _make_message(turn: Turn) -> dict[str, Any]:
    """A turn as `transformers` writes messages."""
    parts: list[dict[str, str]] = []
    for part in turn.parts:
        parts.append({"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image"})
    return {"role": turn.role, "content": parts}


def _first_difference(found: Sequence[int], expected: Sequence[int], roles: str) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected))
    )
    return (
        f"its ids for a {roles} conversation differ from training's at token {at}: {list(found[at : at + 4])}, "
        f"training {list(expected[at : at + 4])}"
    )
