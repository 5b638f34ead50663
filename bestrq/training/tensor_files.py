"""Writing of safetensors files.

The writer streams: the library's `save_file` first copies all tensors into bytes objects, during which no other thread
runs, and a checkpoint that is written in the background would hold up training.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""names of the dtypes in the format"""
BLOCK = 16 << 20
"""bytes per write"""

Groups = Mapping[str, Mapping[str, Tensor]]
"""tensors by group (model, optimizer, extra) and name"""
Entries = dict[str, dict[str, int]]
"""`bytes` and `crc32` of every file, by name"""


class TensorFile(NamedTuple):
    """File with some or all tensors of a group, and the rank that writes it."""

    group: str
    tensors: list[str]
    rank: int = 0


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """Write tensors on the CPU to an empty file in the safetensors format and return the CRC-32 of the content.

    Format: 8 bytes with the length of the header (little-endian), a JSON header, the values one after another, those
    of large dtypes first, so that all are aligned (https://github.com/huggingface/safetensors).
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    start_of_file = len(encoded).to_bytes(8, "little") + encoded
    file.write(start_of_file)
    crc32 = zlib.crc32(start_of_file)
    for _, tensor in ordered:
        values = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
        for first in range(0, len(values), BLOCK):  # other threads run during both calls
            block = values[first : first + BLOCK]
            file.write(block)
            crc32 = zlib.crc32(block, crc32)
    return crc32


def write_files(folder: Path, files: Mapping[str, TensorFile], tensors: Groups, rank: int) -> Entries:
    """Write those of the files, given by name, that are those of a rank."""
    entries = {}
    for name, file in files.items():
        if file.rank == rank:
            with open(folder / name, "wb") as stream:
                crc32 = write_tensors(stream, {key: tensors[file.group][key] for key in file.tensors})
            entries[name] = {"bytes": (folder / name).stat().st_size, "crc32": crc32}
    return entries
