"""Description of a start of a run, for run.json."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bestrq.training.process import World

PACKAGES = ("torch", "torchaudio", "numpy", "safetensors", "pyarrow", "soundfile", "sentencepiece")
SLURM = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST")


def describe_start(world: World, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """Entry of run.json. Only SLURM ids of the environment are recorded: other variables may hold secrets."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "argv": sys.argv,
        "git": _git(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "host": platform.node(),
        "device": str(world.device),
        "world_size": world.size,
        "slurm": {name: os.environ[name] for name in SLURM if name in os.environ},
        "fingerprints": fingerprints,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit and dirty flag of the source tree, or None if it is not a git checkout."""

    def run_git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=20
        ).stdout.strip()

    try:
        return {"commit": run_git("rev-parse", "HEAD"), "dirty": bool(run_git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
