"""Reading of safetensors files: of one, or of the files among which a group of a checkpoint is divided.

Files are memory-mapped: a tensor that is read costs no memory until its values are used, and a part of it costs the
memory of that part. Its file stays open as long as the tensor exists.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from common.errors import UserError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU. Raises UserError that names the file if it is missing or damaged."""
    with _readable(path):
        return load_file(path)


class StoredTensors(Mapping[str, Tensor]):
    """Tensors of one or several safetensors files by name, on the CPU.

    Raises:
        UserError: a file is missing or damaged, or two files have a tensor of the same name; names the file.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.source = str(paths[0]) if len(paths) == 1 else f"{paths[0]} to {paths[-1].name}"
        self._files: dict[str, tuple[Path, safe_open]] = {}
        for path in paths:
            with _readable(path):
                file = safe_open(path, "pt")
                names = file.keys()
            for name in names:
                if name in self._files:
                    raise UserError(f"{path} has the tensor {name}, which is in {self._files[name][0].name} too")
                self._files[name] = path, file

    def __getitem__(self, name: str) -> Tensor:
        path, file = self._files[name]
        with _readable(path):
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def path(self, name: str) -> Path:
        """File that holds a tensor."""
        return self._files[name][0]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: removed between two calls of safetensors
        raise UserError(f"cannot read {path}: {error}") from error


def file_names(group: str, number: int) -> Iterator[str]:
    """Names of the files of a group (model, optimizer or extra) that is divided into a number of files, in order."""
    if number == 1:
        yield f"{group}.safetensors"
    else:
        yield from (f"{group}-{i:05d}-of-{number:05d}.safetensors" for i in range(1, number + 1))


def group_files(folder: Path, group: str) -> list[Path]:
    """Files of a group of a checkpoint, in order. Raises UserError that names a missing or a surplus file."""
    form = re.compile(rf"{group}(-\d+-of-(\d+))?\.safetensors")
    try:
        found = {match[0]: match[2] for name in os.listdir(folder) if (match := form.fullmatch(name))}
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error}") from error
    number = next((int(number) for number in found.values() if number), 1)  # every file of several has it in its name
    names = []
    for name in file_names(group, number):
        if name not in found:
            raise UserError(f"{folder / name} is missing")
        names.append(name)
    if surplus := found.keys() - set(names):
        raise UserError(f"{folder / min(surplus)} does not belong beside {names[0]}: remove the one left by mistake")
    return [folder / name for name in names]


def read_group(folder: Path, group: str) -> StoredTensors:
    """Tensors of a group of a checkpoint. Raises like `group_files` and `StoredTensors`."""
    return StoredTensors(group_files(folder, group))
