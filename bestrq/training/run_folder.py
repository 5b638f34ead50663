"""The folder of a run: what was asked for, where it ran, and what came of it.

`config.yaml` (resolved), `run.json` (one entry a start), `metrics.jsonl`, `tensorboard/`, `checkpoints/`, `export/`.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bestrq.config import ConfigError, load_yaml, save_yaml, to_dict
from bestrq.files import write_file
from bestrq.training.process import World

PACKAGES = ("torch", "torchaudio", "numpy", "safetensors", "pyarrow", "soundfile", "sentencepiece")
SLURM = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST")


@dataclass
class RunSettings:
    """Where a run lies, how long it is, and how often it speaks."""

    folder: str = "runs/run"
    """run folder: checkpoints, metrics, export. The same command continues what lies there."""
    steps: int = 1000
    """updates of the whole run"""
    seed: int = 0
    """initial weights and dropout; the data have a seed of their own"""
    log_every: int = 10
    """updates between two lines of the console and of metrics.jsonl"""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"run.{name} must be 1 or more, but is {getattr(self, name)}")
        if not self.folder:
            raise ConfigError("run.folder is empty: give a folder, such as runs/first")


class RunFolder:
    """Paths of a run, and the record of its starts."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.record = self.path / "run.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.export = self.path / "export"

    def start(self, settings: Any, world: World, free: Collection[str] = (), fingerprints: dict[str, str] | None = None,
              facts: Mapping[str, str] | None = None) -> None:  # fmt: skip
        """Make the folder, or continue in it; called by all ranks, done by rank 0.

        `settings` is the script's dataclass. `free` names fields and sections (`run.steps`, `loader`) that may differ
        from those that the run began with. `fingerprints` say what the data are, by name (`dataset`,
        `features.num_mels`); they may not change either, and the first that did is named. `facts` go into run.json.
        Raises ConfigError on all ranks when a field that may not change did, or the folder cannot be written.
        """
        problem = None
        if world.is_main:
            try:
                self._start(to_dict(settings), to_dict(type(settings)()), world, free, fingerprints or {}, facts or {})
            except (ConfigError, OSError) as error:
                problem = str(error) if isinstance(error, ConfigError) else f"cannot use the run folder: {error}"
        problem = world.broadcast(problem)
        if problem is not None:
            raise ConfigError(problem)

    def _start(
        self, values: dict[str, Any], defaults: dict[str, Any], world: World, free: Collection[str],
        fingerprints: dict[str, str], facts: Mapping[str, str],
    ) -> None:  # fmt: skip
        starts = self._read_record()
        trained = self._has_checkpoints()
        if trained and not self.config.exists():
            raise ConfigError(f"{self.path} holds checkpoints but no config.yaml: choose another run folder")
        if trained:  # before the first checkpoint there is nothing that another configuration could spoil
            differences = list(_differences(_completed(load_yaml(self.config), defaults), values, free))
            if differences:
                raise ConfigError(
                    f"the run in {self.path} began with another configuration: {'; '.join(differences)}. "
                    "Take the old value, or another run folder"
                )
            for role, fingerprint in fingerprints.items():
                old = starts[-1].get("fingerprints", {}).get(role, fingerprint) if starts else fingerprint
                if old != fingerprint:
                    raise ConfigError(
                        f"the run in {self.path} began with {role} {old}, and now it is {fingerprint}: "
                        "give the old data, or another run folder"
                    )
        self.path.mkdir(parents=True, exist_ok=True)
        save_yaml(values, self.config)
        write_file(
            self.record, json.dumps({"starts": [*starts, {**_describe(world, fingerprints), **facts}]}, indent=1)
        )

    def began_with(self, section: str, name: str) -> Any:
        """A setting of the run in this folder; None where there is no checkpoint yet, or the run did not record it.

        Raises ConfigError where the recorded settings cannot be read.
        """
        if not (self._has_checkpoints() and self.config.exists()):
            return None
        values = load_yaml(self.config).get(section)
        return values.get(name) if isinstance(values, dict) else None

    def _has_checkpoints(self) -> bool:
        return self.checkpoints.is_dir() and any(self.checkpoints.glob("step-*"))

    def _read_record(self) -> list[dict[str, Any]]:
        try:
            return list(json.loads(self.record.read_text())["starts"])
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"cannot read {self.record}: {error!r}. Move it away to go on without it") from error


def _completed(old: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the defaults of fields that are newer than it: a run continues after an upgrade."""
    filled = {name: _completed(old.get(name, {}), value) for name, value in defaults.items() if isinstance(value, dict)}
    return {**defaults, **old, **filled}


def _differences(old: dict[str, Any], new: dict[str, Any], free: Collection[str], at: str = "") -> Iterator[str]:
    """`field: was A, is B` for every field that differs and is not free."""
    for name in [*old, *(name for name in new if name not in old)]:
        field = f"{at}{name}"
        before, after = old.get(name), new.get(name)
        if field in free or before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, free, f"{field}.")
        else:
            yield f"{field} was {before!r}, is {after!r}"


def _describe(world: World, fingerprints: dict[str, str]) -> dict[str, Any]:
    """One start. Of the environment only the SLURM ids: a dump of it would hold secrets."""
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
    """Commit and dirty flag of the source tree, or None where it is not a git checkout."""

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
