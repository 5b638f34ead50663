"""Reading of exports, and of checkpoints in place of exports. Reading executes no code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bestrq.training.checkpoint import read_tensors, verify_checkpoint
from bestrq.training.export import recover
from common.config import load_yaml
from common.errors import UserError
from common.files import read_json, read_json_object


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
    """Read an export, with tensors on the CPU. Raises UserError that names the missing or damaged file."""
    folder = Path(folder)
    recover(folder)
    if not folder.is_dir():
        raise UserError(f"there is no export at {folder}: give the folder that holds model.safetensors")
    config = read_json_object(folder / "config.json")
    return Export(folder, read_tensors(folder / "model.safetensors"), config)


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
