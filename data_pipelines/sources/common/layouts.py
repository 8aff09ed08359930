"""Which source reads records that are laid out like a given one, so that a message can name it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

IMAGE_FIELDS = ("image", "images", "image_path", "file_name", "filename", "filepath", "file", "path", "img", "picture")
TEXT_FIELDS = ("text", "caption", "captions", "title", "description", "label", "txt")


def suggest_source(record: Any) -> str:
    """The options of `build` that read such a record, for example `captions image_column=file_name`; "": not known.

    Only the fields are looked at, and what the turns of a conversation hold.
    """
    if not isinstance(record, Mapping):
        return ""
    fields = {str(name) for name, value in record.items() if value is not None}
    if {"chosen", "rejected"} <= fields:
        return "preference_pairs" if "question" in fields else "messages"
    if "messages" in fields:
        return "messages"
    if "conversations" in fields:
        return _suggest_for_conversations(record, fields)
    if {"instruction", "output"} <= fields:
        return "alpaca"
    if fields & {"video", "videoid"} and ("caption" in fields or {"question", "answer"} <= fields):
        return "video_folder" + ("" if "video" in fields else " column=videoid")
    return suggest_columns(fields)


def suggest_columns(fields: Collection[str]) -> str:
    """The options with which `captions` reads records of these fields; "": it does not."""
    image = next((name for name in IMAGE_FIELDS if name in fields), "")
    if {"question", "answer"} <= {*fields}:
        text, more = "answer", " question_column=question"
    else:
        text, more = next((name for name in TEXT_FIELDS if name in fields), ""), ""
    if not image or not text:
        return ""
    named = (("image_column", image, "image"), ("text_column", text, "text"))
    return "captions" + "".join(f" {option}={name}" for option, name, usual in named if name != usual) + more


def hint_at_source(record: Any, own: Collection[str] = ()) -> str:
    """The end of a message that names the source for a record; "" if none is known, or it is one of `own`."""
    found = suggest_source(record)
    return f"; source={found} reads such records" if found and found.partition(" ")[0] not in own else ""


def _suggest_for_conversations(record: Mapping[str, Any], fields: Collection[str]) -> str:
    if "<img>" in str(record["conversations"])[:10_000]:
        return "qwen_vl"
    if "video" in fields:
        return "video_folder"
    return "llava_json" if "image" in fields or "images" in fields else "sharegpt"
