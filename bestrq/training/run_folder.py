"""The folder of a run: what was asked for, where it ran, and what came of it.

`config.yaml` (resolved), `run.json` (one entry a start), `metrics.jsonl`, `tensorboard/`, `checkpoints/`, `export/`.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bestrq.training.process import World
from common.config import load_yaml, save_yaml, to_dict
from common.errors import UserError
from common.files import canonical_path, write_file

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
                raise UserError(f"run.{name} must be 1 or more, but is {getattr(self, name)}")
        if not self.folder:
            raise UserError("run.folder is empty: give a folder, such as runs/first")


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

    def start(
        self, settings: Any, world: World, free: Collection[str] = (), fingerprints: Mapping[str, str] | None = None,
        places: Mapping[str, str] | None = None, origins: Mapping[str, Callable[[], str]] | None = None,
        facts: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Make the folder, or continue in it; called by all ranks, done by rank 0.

        `settings` is the script's dataclass. `free` names fields and sections (`run.steps`, `loader`) that may differ
        from those that the run began with. `fingerprints` identify the data, by name (`dataset`, `features.num_mels`);
        they may not change either, and the error names the first one that did.

        `places` maps fields that hold the location of data to the name of the data's fingerprint. Data may move, so
        such a field may differ if that fingerprint was recorded. `origins` maps fields that hold the location of the
        initial weights (`finetune.init`) to functions that compute their fingerprint. They are called before the first
        checkpoint, and later only for a field that differs.

        A field of all items of a list is written `data.mixture[].dataset`. `facts` are added to run.json. Raises
        UserError on all ranks when a field that may not change did, or the folder cannot be written.
        """
        problem = None
        if world.is_main:
            try:
                values, defaults = to_dict(settings), to_dict(type(settings)())
                began = self._continue(values, defaults, free, fingerprints or {}, places or {}, origins or {})
                self.path.mkdir(parents=True, exist_ok=True)
                save_yaml(values, self.config)
                start = {**_describe(world, {**(fingerprints or {}), **began}), **(facts or {})}
                write_file(self.record, json.dumps({"starts": [*self._read_record(), start]}, indent=1))
            except (UserError, OSError) as error:
                problem = str(error) if isinstance(error, UserError) else f"cannot use the run folder: {error}"
        problem = world.broadcast(problem)
        if problem is not None:
            raise UserError(problem)

    def _continue(
        self, values: dict[str, Any], defaults: dict[str, Any], free: Collection[str],
        fingerprints: Mapping[str, str], places: Mapping[str, str], origins: Mapping[str, Callable[[], str]],
    ) -> dict[str, str]:  # fmt: skip
        """Check the settings against those of the run in the folder, if any. Returns the fingerprints of `origins`."""
        starts = self._read_record()
        recorded: dict[str, str] = starts[-1].get("fingerprints", {}) if starts else {}
        trained = self._has_checkpoints()
        if trained and not self.config.exists():
            raise UserError(f"{self.path} holds checkpoints but no config.yaml: choose another run folder")
        if trained:  # before the first checkpoint there is nothing that another configuration could spoil
            changed = _differences(_completed(load_yaml(self.config), defaults), values, free)
            proof = {**places, **{field: field for field in origins}}
            changed = [one for one in changed if not (one.pattern in proof and _same_place(one.before, one.after))]
            moved = {one.field: one for one in changed if proof.get(one.pattern) in recorded}
            if differences := [str(one) for one in changed if one.field not in moved]:
                raise UserError(
                    f"the run in {self.path} began with another configuration: {'; '.join(differences)}. "
                    "Take the old value, or another run folder"
                )
            began = {name: origins[name]() for name in origins if name in moved}
            for name, fingerprint in {**fingerprints, **began}.items():
                if recorded.get(name, fingerprint) != fingerprint:
                    elsewhere = "".join(
                        f" ({one})" for one in moved.values() if name in (one.field, proof[one.pattern])
                    )
                    raise UserError(
                        f"the run in {self.path} began with {name} {recorded[name]}, and now it is {fingerprint}"
                        f"{elsewhere}: give the old data, or another run folder"
                    )
            return {name: recorded[name] for name in origins if name in recorded}
        return {name: fingerprint() for name, fingerprint in origins.items()}

    def began_with(self, section: str, name: str) -> Any:
        """Recorded setting of the run in this folder; None before the first checkpoint, or if it cannot be read.

        `start` reports unreadable settings on all ranks.
        """
        if not (self._has_checkpoints() and self.config.exists()):
            return None
        try:
            values = load_yaml(self.config).get(section)
        except UserError:
            return None
        return values.get(name) if isinstance(values, dict) else None

    def _has_checkpoints(self) -> bool:
        return self.checkpoints.is_dir() and any(self.checkpoints.glob("step-*"))

    def _read_record(self) -> list[dict[str, Any]]:
        try:
            return list(json.loads(self.record.read_text(encoding="utf-8"))["starts"])
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot read {self.record}: {error!r}. Move it away to go on without it") from error


def _completed(old: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the defaults of fields that are newer than it: a run continues after an upgrade."""
    filled = {name: _completed(old.get(name, {}), value) for name, value in defaults.items() if isinstance(value, dict)}
    return {**defaults, **old, **filled}


@dataclass(frozen=True)
class _Difference:
    field: str
    before: Any
    after: Any

    @property
    def pattern(self) -> str:
        """The field without list indices: `data.mixture[].dataset`."""
        return re.sub(r"\[\d+\]", "[]", self.field)

    def __str__(self) -> str:
        return f"{self.field} was {self.before!r}, is {self.after!r}"


def _differences(before: Any, after: Any, free: Collection[str], field: str = "") -> list[_Difference]:
    """Fields that differ and are not free. Lists of equal length are compared item by item."""
    if field in free or before == after:
        return []
    if isinstance(before, dict) and isinstance(after, dict):
        at = f"{field}." if field else ""
        inner = [(f"{at}{name}", before.get(name), after.get(name)) for name in {**before, **after}]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        inner = [(f"{field}[{number}]", *pair) for number, pair in enumerate(zip(before, after, strict=True))]
    else:
        return [_Difference(field, before, after)]
    return [one for name, old, new in inner for one in _differences(old, new, free, name)]


def _same_place(before: Any, after: Any) -> bool:
    """Whether two values are spellings of one path: relative, with a trailing slash, through a link."""
    are_paths = isinstance(before, str) and isinstance(after, str)
    return are_paths and canonical_path(before) == canonical_path(after)


def _describe(world: World, fingerprints: Mapping[str, str]) -> dict[str, Any]:
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
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=20
        ).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
