"""Arrays of an uncompressed `.npz` as views of the mapped file: nothing is read before it is used, processes of a node
share what they use, and a damaged file cannot make any of them read elsewhere or allocate."""

from __future__ import annotations

import mmap
import re
import struct
from pathlib import Path
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np

from data_pipelines.shards.checksum import crc32

LOCAL_HEADER = 30  # bytes before name and extra field in a zip's local file header
HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([<>|][iuf][1248])', 'fortran_order': \w+, 'shape': \((\d{1,18}),\), \} *\n",
    re.DOTALL,
)
"""How numpy begins a flat array of numbers. Its own reader hands more than that to Python's parser."""


UNREADABLE = (OSError, ValueError, KeyError, EOFError, RecursionError, NotImplementedError, struct.error, BadZipFile)
"""What reading a damaged zip, array header or list of names can raise."""


def map_arrays(path: Path, *, checked: bool = False) -> dict[str, np.ndarray]:
    """All arrays of the file by name: flat, of numbers, read-only.

    Args:
        checked: read all of it once, and compare it with its checksums.

    Raises one of `UNREADABLE` for anything else.
    """
    with open(path, "rb") as file, ZipFile(file) as archive:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return {info.filename.removesuffix(".npy"): _map_array(memory, info, checked) for info in archive.infolist()}


def _map_array(memory: mmap.mmap, info: ZipInfo, checked: bool) -> np.ndarray:
    local = memory[info.header_offset : info.header_offset + LOCAL_HEADER]
    if info.compress_type != ZIP_STORED or info.flag_bits & 1 or local[:4] != b"PK\x03\x04":
        raise ValueError(f"{info.filename} is compressed, encrypted or damaged; only stored arrays are read")
    start = info.header_offset + LOCAL_HEADER + sum(struct.unpack_from("<HH", local, 26))
    if start + info.file_size > len(memory):
        raise ValueError(f"{info.filename}: {info.file_size} bytes at {start}, the file has {len(memory)}")
    if checked and crc32(memoryview(memory)[start : start + info.file_size]) != info.CRC:
        raise ValueError(f"{info.filename} is damaged: its checksum differs")
    (length,) = struct.unpack_from("<8xH", memory[start : start + 10].ljust(10, b"\0"))
    header = HEADER.fullmatch(memory[start : min(start + 10 + length, start + info.file_size)])
    if not header:
        raise ValueError(
            f"{info.filename}: {memory[start + 10 : start + 90].strip()!r}; only flat arrays of numbers are read"
        )
    dtype, count, start = np.dtype(header[1].decode()), int(header[2]), start + header.end()
    if header.end() + count * dtype.itemsize != info.file_size:
        raise ValueError(f"{info.filename}: {count} items of {dtype} in {info.file_size} bytes")
    return np.frombuffer(memory, dtype, count, start)
