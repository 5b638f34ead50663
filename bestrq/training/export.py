"""Writing of exports: `model.safetensors`, `config.json`, `README.md` (model card), extra files such as the tokenizer.

The format is readable without this project; `export_reading.py` reads it. `config.json` has the CRC-32 of the weights
and of the extra files, as `checksums`.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bestrq.training.tensor_files import write_tensors
from common.errors import UserError
from common.files import sync, temporary_name

OWN_FILES = ("model.safetensors", "config.json", "README.md")


def write_export(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    model_card: str,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write an export, replacing an existing one. Called on rank 0 only, with unsharded tensors (`gather_model`).

    The export is written to a temporary folder and renamed. Two renames replace an existing export; between them, and
    after a crash there, it is in `.old-NAME`, which readers find and the next write restores. Raises UserError if
    writing fails, or if the name of an extra file is reserved or has a folder.
    """
    folder = Path(folder)
    for name in extra_files or {}:
        if name in OWN_FILES or name in ("", ".", "..") or Path(name).name != name:
            raise UserError(
                f"invalid name of an extra file of an export: {name!r}; give a plain name that is not reserved"
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    _recover(folder)
    temporary, old = temporary_name(folder), old_version(folder)
    try:
        temporary.mkdir()
        whole = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        with open(temporary / "model.safetensors", "wb") as file:
            checksums = {"model.safetensors": write_tensors(file, whole, {"format": "pt"})}
        for name, content in (extra_files or {}).items():
            (temporary / name).write_bytes(content)
            checksums[name] = zlib.crc32(content)
        document = {**config, "checksums": checksums}
        (temporary / "config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(model_card, encoding="utf-8", errors="backslashreplace")
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        if folder.exists():
            os.rename(folder, old)
        os.rename(temporary, folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _recover(folder)
        raise UserError(f"cannot write the export {folder}: {error}") from error
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def old_version(folder: Path) -> Path:
    """Place of an export while another one replaces it."""
    absolute = folder.absolute()  # "." has no name
    return absolute.parent / f".old-{absolute.name}"


def _recover(folder: Path) -> None:
    """Undo a replacement interrupted between its two renames."""
    if not folder.exists() and old_version(folder).exists():
        os.rename(old_version(folder), folder)
    shutil.rmtree(old_version(folder), ignore_errors=True)
