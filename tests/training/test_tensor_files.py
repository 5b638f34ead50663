"""Safetensors files written block by block are those of the library."""

import io
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file

from bestrq.training import tensor_files
from bestrq.training.tensor_files import NAMES, write_tensors


@pytest.mark.parametrize("block", [7, 1 << 20])
def test_every_dtype_and_shape_survives_and_the_checksum_is_that_of_the_file(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "BLOCK", block)
    torch.manual_seed(0)
    tensors = {f"{dtype}": (torch.randn(3, 5) * 9).to(dtype) for dtype in NAMES}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "transposed": torch.randn(4, 3).t()}
    with open(tmp_path / "file", "wb") as file:
        crc32 = write_tensors(file, tensors, {"format": "pt"})
    assert crc32 == zlib.crc32((tmp_path / "file").read_bytes())
    stored = load_file(tmp_path / "file")
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert stored[name].dtype == tensor.dtype and torch.equal(stored[name], tensor), name
    with safe_open(tmp_path / "file", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_values_are_aligned_to_their_size() -> None:
    file = io.BytesIO()
    write_tensors(file, {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(1, dtype=torch.float64)})
    content = file.getvalue()
    assert len(content) % 8 == 3 and load(content)["b"].item() == 1.0  # the eight-byte number comes first
