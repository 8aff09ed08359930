"""Filters on pictures and videos: size, aspect ratio, damage, near duplicates."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipelines.errors import BadSample, DataError
from data_pipelines.filters import Drop, Filter, check_range, drop_outside
from data_pipelines.inputs.files import require_module
from data_pipelines.media.limits import check_pixels
from data_pipelines.media.pictures import decode_picture
from data_pipelines.sample import Sample

BITS = 64  # of a perceptual hash


class ImageSize(Filter):
    """Drops samples with a picture or video whose shorter side is below `min_side` or longer side above `max_side`."""

    def __init__(self, *, min_side: int | None = None, max_side: int | None = None) -> None:
        check_range("image_size", min_side, max_side)
        self.min_side, self.max_side = min_side, max_side

    def measure(self, sample: Sample, blobs: Sequence[bytes]) -> Drop | None:
        """Sizes are known from the headers."""
        for item in sample.media:
            short, long = sorted((item.width, item.height))
            reason = drop_outside("shorter side", short, self.min_side, None)
            if reason := reason or drop_outside("longer side", long, None, self.max_side):
                return reason
        return None


class AspectRatio(Filter):
    """Drops samples with a picture or video whose longer side is more than `max_ratio` times the shorter one."""

    def __init__(self, *, max_ratio: float) -> None:
        if max_ratio < 1:
            raise DataError(f"aspect_ratio: max_ratio {max_ratio}; allowed: 1 or more")
        self.max_ratio = max_ratio

    def measure(self, sample: Sample, blobs: Sequence[bytes]) -> Drop | None:
        """Sizes are known from the headers."""
        for item in sample.media:
            ratio = max(item.width, item.height) / min(item.width, item.height)
            if reason := drop_outside("aspect ratio", ratio, None, self.max_ratio):
                return reason
        return None


class Corrupt(Filter):
    """Drops samples with a picture that does not decode to its end."""

    def measure(self, sample: Sample, blobs: Sequence[bytes]) -> Drop | None:
        """Decode every picture; drop the sample if one does not decode."""
        for item, blob in zip(sample.media, blobs, strict=True):
            if item.kind == "image":
                try:
                    check_pixels(blob)
                except BadSample:
                    return Drop("picture does not decode")
        return None


class SimilarImages(Filter):
    """Drops samples whose every picture looks like one of an earlier sample: near duplicates.

    Two pictures look alike when their perceptual hashes (imagehash.phash, 64 bits) differ in at most `max_distance`
    bits. Samples without pictures are kept. All hashes are compared through `max_distance + 1` bands, which finds every
    pair; its cost grows with the square of the pictures, slowly up to about a million.
    """

    def __init__(self, *, max_distance: int = 4) -> None:
        if not 0 <= max_distance < BITS:
            raise DataError(f"similar_images: max_distance {max_distance}; allowed: 0 to {BITS - 1}")
        self.max_distance = max_distance
        edges = [BITS * band // (max_distance + 1) for band in range(max_distance + 2)]
        self._bands = list(zip(edges, edges[1:]))
        self._seen: dict[tuple[int, int], list[int]] = {}
        require_module("imagehash")

    def measure(self, sample: Sample, blobs: Sequence[bytes]) -> list[int]:
        """The hash of every picture."""
        hashes = []
        for item, blob in zip(sample.media, blobs, strict=True):
            if item.kind == "image":
                check_pixels(blob)
                hashes.append(int(str(require_module("imagehash").phash(decode_picture(blob, item.name)[0])), 16))
        return hashes

    def verdict(self, key: str, measured: list[int]) -> Drop | None:
        """Remembers the pictures of kept samples."""
        if measured and all(self._is_seen(value) for value in measured):
            return Drop("pictures look like those of an earlier sample")
        for value in measured:
            for band in self._split_hash(value):
                self._seen.setdefault(band, []).append(value)
        return None

    def _is_seen(self, value: int) -> bool:
        candidates = (other for band in self._split_hash(value) for other in self._seen.get(band, ()))
        return any((value ^ other).bit_count() <= self.max_distance for other in candidates)

    def _split_hash(self, value: int) -> list[tuple[int, int]]:
        """Two hashes that differ in at most `max_distance` bits agree in at least one of these."""
        return [(low, value >> low & (1 << high - low) - 1) for low, high in self._bands]
