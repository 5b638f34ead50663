"""Exports: `model.safetensors`, `config.json`, `README.md` (model card) and extra files such as the tokenizer.

The format is readable without this project, and reading it executes no code.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bestrq.training.checkpoint import read_tensors, verify_checkpoint
from common.config import load_yaml
from common.errors import UserError
from common.files import read_json, read_json_object, sync, temporary_name

OWN_FILES = ("model.safetensors", "config.json", "README.md")


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


def write_export(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    model_card: str,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write an export, replacing an existing one. Called on rank 0 only, with unsharded tensors (`gather_model`).

    The export is written to a temporary folder and renamed. Two renames replace an existing export; after a crash
    between them it is in `.old-NAME`, and the next write or read restores it. Raises UserError if writing fails, or if
    the name of an extra file is reserved or has a folder.
    """
    folder = Path(folder)
    for name in extra_files or {}:
        if name in OWN_FILES or name in ("", ".", "..") or Path(name).name != name:
            raise UserError(
                f"invalid name of an extra file of an export: {name!r}; give a plain name that is not reserved"
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    _recover(folder)
    temporary, old = temporary_name(folder), _old(folder)
    try:
        temporary.mkdir()
        # Copies, because save_file refuses tensors that share memory.
        whole = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        save_file(whole, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(model_card, encoding="utf-8", errors="backslashreplace")
        for name, content in (extra_files or {}).items():
            (temporary / name).write_bytes(content)
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        if folder.exists():
            os.rename(folder, old)
        os.rename(temporary, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _recover(folder)
        raise UserError(f"cannot write the export {folder}: {error}") from error
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def read_export(folder: str | Path) -> Export:
    """Read an export, with tensors on the CPU. Raises UserError that names the missing or damaged file."""
    folder = Path(folder)
    _recover(folder)
    if not folder.is_dir():
        raise UserError(f"there is no export at {folder}: give the folder that holds model.safetensors")
    config = read_json_object(folder / "config.json")
    return Export(folder, read_tensors(folder / "model.safetensors"), config)


def _old(folder: Path) -> Path:
    absolute = folder.absolute()  # "." has no name
    return absolute.parent / f".old-{absolute.name}"


def _recover(folder: Path) -> None:
    """Undo a replacement interrupted between its two renames."""
    if not folder.exists() and _old(folder).exists():
        os.rename(_old(folder), folder)
    shutil.rmtree(_old(folder), ignore_errors=True)


def read_trained(folder: str | Path) -> Export:
    """Read an export, or a checkpoint (RUN_FOLDER/checkpoints/step-...) with the settings of its run.

    Raises UserError that names the missing or damaged file.
    """
    folder = Path(folder)
    if not (folder / "state.json").exists():
        return read_export(folder)
    if problem := verify_checkpoint(folder):
        raise UserError(f"{folder} cannot be used: {problem}; choose another checkpoint of the run")
    try:
        settings = load_yaml(folder.resolve().parent.parent / "config.yaml")
    except UserError as error:
        raise UserError(
            f"{folder} is a checkpoint, and its settings are read from config.yaml two folders above: {error}; give a "
            "checkpoint in its run folder, or an export"
        ) from error
    try:
        features = read_json(folder / "state.json")["state"]["features"]
        config = {"encoder": settings["encoder"], "normalisation": settings["data"]["normalisation"]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}: the settings of its run lack {error}; give RUN_FOLDER/export") from error
    return Export(folder, read_tensors(folder / "model.safetensors"), {**config, "features": features})
