"""Writing of exports: `model.safetensors`, `config.json`, `README.md` (model card), extra files such as the tokenizer.

The format is readable without this project; `export_reading.py` reads it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

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
    recover(folder)
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
        recover(folder)
        raise UserError(f"cannot write the export {folder}: {error}") from error
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _old(folder: Path) -> Path:
    absolute = folder.absolute()  # "." has no name
    return absolute.parent / f".old-{absolute.name}"


def recover(folder: Path) -> None:
    """Undo a replacement interrupted between its two renames."""
    if not folder.exists() and _old(folder).exists():
        os.rename(_old(folder), folder)
    shutil.rmtree(_old(folder), ignore_errors=True)
