"""What a file is, told by its first bytes: for messages, and to tell pictures from videos."""

from __future__ import annotations

STILL = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
"""Brands of ISO media files (MP4 is one) that hold pictures."""

STARTS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"8BPS", "Photoshop"),
    (b"\0\0\x01\0", "ICO"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"%PDF", "PDF"),
    (b"FLV", "FLV video"),
    (b"OggS", "Ogg"),
    (b"\0\0\x01\xba", "MPEG video"),
    (b"\0\0\x01\xb3", "MPEG video"),
    (b"0&\xb2u", "Windows Media video"),
    (b"PK\x03\x04", "ZIP"),
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"version https://git-lfs", "a Git LFS pointer"),
)
MARKUP = ((b"<svg", "SVG"), (b"<!doctype html", "an HTML page"), (b"<html", "an HTML page"), (b"<?xml", "XML"))


def is_picture_brand(data: bytes) -> bool:
    """Whether an ISO media file holds a picture (AVIF, HEIC), not a video."""
    return data[4:8] == b"ftyp" and data[8:12] in STILL


def describe_format(data: bytes) -> str:
    """The format of a file as messages name it."""
    if not data:
        return "an empty file"
    if is_picture_brand(data):
        return "AVIF" if data[8:12] in (b"avif", b"avis") else "HEIC"
    if data[4:8] == b"ftyp":
        return "MP4"
    if data[:4] == b"\x1aE\xdf\xa3":
        return "Matroska or WebM"
    if data[:4] == b"RIFF":
        return {b"WEBP": "WEBP", b"AVI ": "AVI video", b"WAVE": "WAV sound"}.get(data[8:12], "a RIFF file")
    if data[:1] == b"G" and data[188:189] == b"G":
        return "MPEG transport stream"
    for start, name in STARTS:
        if data.startswith(start):
            return name
    head = data[:512].lower()
    for start, name in MARKUP:
        if start in head:
            return name
    return "bytes of no known format"
