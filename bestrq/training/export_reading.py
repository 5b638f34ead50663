"""Reading of exports. Reading executes no code and writes nothing."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bestrq.training.export import old_version
from bestrq.training.tensor_reading import read_tensors
from common.errors import UserError
from common.files import as_object, crc32_of, read_json_object

ATTEMPTS = 100
"""times that an export that is being replaced is read, 0.05 s apart"""


@dataclass(frozen=True)
class Export:
    """Content of an export."""

    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]

    def file(self, name: str) -> bytes:
        """Content of an extra file. Raises UserError if it is missing."""
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise UserError(f"the export {self.path} lacks {name}: {error}") from error


def read_export(folder: str | Path) -> Export:
    """Read an export, with tensors on the CPU: one version, also while a training run replaces it.

    Raises:
        UserError: a file is missing or damaged, differs from its checksum, or has non-finite weights; names the file.
    """
    folder = Path(folder)
    places = (folder, old_version(folder), folder)  # one of them has an export, at any time of a replacement
    for _ in range(ATTEMPTS):
        if not any(place.is_dir() for place in places):
            raise UserError(f"there is no export at {folder}: give the folder that holds model.safetensors")
        for place in places[:2]:
            try:
                descriptor = os.open(place, os.O_RDONLY)  # while it is open, no new folder has its inode number
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise UserError(f"{place} cannot be read: {error}") from error
            try:
                export = _read_version(place)
                if _is_at(descriptor, place):
                    return export
            except UserError:
                if place == folder and _is_at(descriptor, place):
                    raise
            finally:
                os.close(descriptor)
        time.sleep(0.05)
    raise UserError(f"the export {folder} is being replaced all the time: try again")


def _is_at(descriptor: int, folder: Path) -> bool:
    """Whether an open folder is still at its path."""
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except OSError:
        return False


def _read_version(folder: Path) -> Export:
    config = read_json_object(folder / "config.json")
    checksums = config.pop("checksums", {})  # exports of earlier versions have none
    for name, expected in as_object(checksums, folder / "config.json").items():
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"the export {folder} lacks {name!r}, which its config.json lists: export again")
        try:
            found = crc32_of(folder / name)
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read: {error}") from error
        if found != expected:
            raise UserError(f"{folder / name} does not match its checksum in config.json: it is damaged, export again")
    return Export(folder, read_finite(folder / "model.safetensors"), config)


def read_finite(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises UserError if it is damaged, or a weight is infinite or not a number."""
    tensors = read_tensors(path)
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{path}: {name} has non-finite weights, the training diverged: give an earlier model")
    return tensors
