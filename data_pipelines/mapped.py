"""Arrays of an uncompressed `.npz` as views of the mapped file: nothing is read before it is used, processes of a node
share what they use, and a damaged file cannot make any of them read elsewhere or allocate."""

from __future__ import annotations

import io
import mmap
import struct
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np

LOCAL_HEADER = 30  # bytes before name and extra field in a zip's local file header
MAX_HEADER = 4096  # bytes of an array's header that are looked at; flat arrays need 128


def map_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of the file by name: flat, of numbers, read-only.

    Raises OSError, ValueError or BadZipFile for anything else.
    """
    with open(path, "rb") as file, ZipFile(file) as archive:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return {info.filename.removesuffix(".npy"): _array(memory, info) for info in archive.infolist()}


def _array(memory: mmap.mmap, info: ZipInfo) -> np.ndarray:
    local = memory[info.header_offset : info.header_offset + LOCAL_HEADER]
    if info.compress_type != ZIP_STORED or info.flag_bits & 1 or local[:4] != b"PK\x03\x04":
        raise ValueError(f"{info.filename} is compressed, encrypted or damaged; only stored arrays are read")
    start = info.header_offset + LOCAL_HEADER + sum(struct.unpack_from("<HH", local, 26))
    if start + info.file_size > len(memory):
        raise ValueError(f"{info.filename}: {info.file_size} bytes at {start}, the file has {len(memory)}")
    header = io.BytesIO(memory[start : start + min(info.file_size, MAX_HEADER)])
    version = np.lib.format.read_magic(header)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(header, max_header_size=MAX_HEADER)
    if len(shape) != 1 or dtype.kind not in "iuf":
        raise ValueError(f"{info.filename}: {dtype} of shape {shape}; only flat arrays of numbers are read")
    if shape[0] < 0 or header.tell() + shape[0] * dtype.itemsize != info.file_size:
        raise ValueError(f"{info.filename}: {shape[0]} items of {dtype} in {info.file_size} bytes")
    return np.frombuffer(memory, dtype, shape[0], start + header.tell())
