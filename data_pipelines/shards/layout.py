"""What the members of others' samples are: which one is the text, which are the pictures and videos."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data_pipelines.errors import BadSample, DataError
from data_pipelines.media.limits import check_media, media_item
from data_pipelines.sample import Sample
from data_pipelines.shards.members import (
    ALLOWED,
    JSON,
    MEDIA,
    caption_annotation,
    list_names,
    member_extension,
    parse_object,
    to_sample,
)

LAYOUTS = Path(__file__).parents[1] / "conf" / "layout"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout of `<key>.<name>` members.

    Args:
        text: the name of the member that holds the text (`txt`, `caption.txt`), or a field of a JSON member
            (`json.caption`, `json.info.captions`): a text, or a list of texts, each of which is an annotation.
        media: names or extensions of the members that are pictures or videos, in the order of the sample's media;
            empty: all that are pictures or videos. All other members are left alone, whatever they hold.
        meta: fields of the `json` member that become the sample's `meta`.
    """

    text: str = "txt"
    media: tuple[str, ...] = ()
    meta: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layout:
        """Raises `DataError` for options that do not exist or are of another type."""
        known = ("text", "media", "meta")
        wrong = [name for name in data if name not in known or isinstance(data[name], str) != (name == "text")]
        wrong += [n for n in known[1:] if not isinstance(data.get(n, ()), Sequence)]
        if wrong or not data.get("text", "txt"):
            raise DataError(
                f"layout: got {dict(data)}; expected text (a member, or a field such as json.caption), media and meta "
                "(lists of names)"
            )
        lists = {name: tuple(map(str, data.get(name, ()))) for name in ("media", "meta")}
        return cls(text=str(data.get("text", "txt")), **lists)

    @classmethod
    def from_option(cls, option: str | Mapping[str, Any]) -> Layout:
        """The layout of a file in `conf/layout`, by its name, or of the same options. Raises `DataError`."""
        if isinstance(option, Mapping):
            return cls.from_json(option)
        files: dict[Any, Path] = {path.stem: path for path in LAYOUTS.glob("*.yaml")}
        if not isinstance(option, str) or option not in files:
            raise DataError(f"layout: got {option!r}; allowed: {', '.join(sorted(files))}, or text, media and meta")
        return cls.from_json(OmegaConf.to_container(OmegaConf.load(files[option])))  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        return json.loads(json.dumps(asdict(self)))

    def is_used(self, name: str) -> bool:
        """Whether the layout reads a member of this name."""
        return name == self._text_member or self._is_media(name) or bool(self.meta and name.lower() == JSON)

    def read_sample(self, key: str, parts: Sequence[tuple[str, bytes]]) -> tuple[Sample, list[bytes]]:
        """The sample of members `(name, bytes)`, and the bytes of its media. Raises `BadSample`."""
        members = dict(parts)
        if self._text_member not in members:
            raise BadSample(
                f"sample {key!r}: no member {self._text_member!r} for its text; it has {list_names(list(members))}"
            )
        blobs = [members[name] for name in self._order_media(list(members))]
        if not blobs:
            raise BadSample(f"sample {key!r}: no picture or video among {list_names(list(members))}")
        media = tuple(media_item(number, blob) for number, blob in enumerate(blobs))
        texts = self._read_texts(key, members[self._text_member])
        annotations = tuple(caption_annotation(text, images=len(media)) for text in texts)
        return Sample(key=key, media=media, annotations=annotations, meta=self._read_meta(key, members)), blobs

    @property
    def _text_member(self) -> str:
        """The member that holds the text: of `json.caption`, `json`; of `caption.txt`, itself."""
        return JSON if self.text.startswith(f"{JSON}.") else self.text

    def _is_media(self, name: str) -> bool:
        extension = member_extension(name)
        return (name in self.media or extension in self.media) if self.media else extension in MEDIA

    def _order_media(self, names: list[str]) -> list[str]:
        found = [name for name in names if self._is_media(name)]
        asked = [name for one in self.media for name in found if one in (name, member_extension(name))]
        return list(dict.fromkeys(asked)) if self.media else found

    def _read_texts(self, key: str, data: bytes) -> list[str]:
        if self._text_member == self.text:
            try:
                value: Any = data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise BadSample(f"sample {key!r}: member {self.text} is not UTF-8: {error}") from error
        else:
            value = parse_object(key, data)
            for field in self.text.split(".")[1:]:
                value = value.get(field) if isinstance(value, dict) else None
        texts = [one.strip() for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]
        if not any(texts):
            raise BadSample(f"sample {key!r}: {self.text} holds no text")
        return [text for text in texts if text]

    def _read_meta(self, key: str, members: Mapping[str, bytes]) -> dict[str, Any]:
        if not self.meta:
            return {}
        found = parse_object(key, members[JSON]) if JSON in members else {}
        return {name: found.get(name) for name in self.meta}


class OwnLayout(Layout):
    """Samples as `data_pipelines.build` writes them, and captions, whose JSON becomes `meta`: sets without a layout."""

    def is_used(self, name: str) -> bool:
        """Whether a sample may have a member of this name."""
        return member_extension(name) in ALLOWED

    def read_sample(self, key: str, parts: Sequence[tuple[str, bytes]]) -> tuple[Sample, list[bytes]]:
        """As of any layout; what a sample's JSON says of its media has to be so."""
        sample, blobs = to_sample(key, list(parts))
        for item, blob in zip(sample.media, blobs, strict=True):
            check_media(item, blob)
        return sample, blobs
