"""The export: the folder that others use. `model.safetensors`, `config.json`, `README.md` (model card), extra files
such as the tokenizer. Read by tools that know nothing of this project; reading runs no code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bestrq.training.checkpoint import read_tensors, verify_checkpoint
from common.config import load_yaml
from common.errors import UserError
from common.files import read_json, read_json_object, sync, temporary_name

OWN_FILES = ("model.safetensors", "config.json", "README.md")


@dataclass(frozen=True)
class Export:
    """An export as read."""

    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]

    def file(self, name: str) -> bytes:
        """Content of an extra file. Raises UserError when it is not there."""
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
    """Write an export, replacing an older one. Call it on rank 0 only, with whole tensors (`gather_model`).

    Written beside the folder and renamed into place. Two renames replace an older export; a crash right between them
    leaves it under `.old-NAME`, from where the next write or read brings it back. Raises UserError for an extra
    file whose name is not a plain one.
    """
    folder = Path(folder)
    for name in extra_files or {}:
        if name in OWN_FILES or name in ("", ".", "..") or Path(name).name != name:
            raise UserError(f"an extra file of an export needs a plain name of its own, but has {name!r}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _recover(folder)
    temporary, old = temporary_name(folder), _old(folder)
    try:
        temporary.mkdir()
        # Copies: a safetensors file may not hold two names for the same memory.
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
    """Read an export; tensors on the CPU. Raises UserError naming the file that is missing or damaged."""
    folder = Path(folder)
    _recover(folder)
    if not folder.is_dir():
        raise UserError(f"there is no export at {folder}: give the folder that holds model.safetensors")
    config = read_json_object(folder / "config.json")
    try:
        tensors = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {folder / 'model.safetensors'}: {error}") from error
    return Export(folder, tensors, config)


def _old(folder: Path) -> Path:
    whole = folder.absolute()  # "." has no name
    return whole.parent / f".old-{whole.name}"


def _recover(folder: Path) -> None:
    """Undo a replacement that was cut short between its two renames."""
    if not folder.exists() and _old(folder).exists():
        os.rename(_old(folder), folder)
    shutil.rmtree(_old(folder), ignore_errors=True)


def read_trained(folder: str | Path) -> Export:
    """An export; or a checkpoint (RUN_FOLDER/checkpoints/step-...), read like one, with the settings of its run.

    Raises UserError naming the file that is missing or damaged.
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
            f"{folder} is a checkpoint, whose settings stand two folders above it: {error}; give it in its run folder, "
            "or an export"
        ) from error
    try:
        features = read_json(folder / "state.json")["state"]["features"]
        config = {"encoder": settings["encoder"], "normalisation": settings["data"]["normalisation"]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}: its run has no {error} of an encoder; give RUN_FOLDER/export") from error
    return Export(folder, read_tensors(folder / "model.safetensors"), {**config, "features": features})
