"""Run folder: resolved settings, record of every start, metrics, checkpoints and export.

`config.yaml`, `run.json` (one entry per start), `run.lock`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`, `export/`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

from bestrq.training.process import FREE_DISTRIBUTED_FIELDS, World
from common.config import load_yaml, save_yaml, to_dict
from common.errors import UserError
from common.files import as_object, read_json, remove_leftovers, write_file

if TYPE_CHECKING:
    from bestrq.training.run_lock import RunLock

# Fields that every script may change when a run is resumed, because they do not affect the optimizer steps.
FREE_RUN_FIELDS = (
    "accumulation",
    "checkpoint",
    *(f"distributed.{name}" for name in FREE_DISTRIBUTED_FIELDS),
    "guard.first_step_minutes",
    "guard.max_bad_updates",
    "guard.step_minutes",
    *("norms", "profile", "tracking"),
    *("run.folder", "run.log_every"),
)


@dataclass
class RunSettings:
    """Folder, length, seed and logging of a run."""

    folder: str = "runs/run"
    """folder of checkpoints, metrics and export; a run in it is resumed"""
    steps: PositiveInt = 1000
    """optimizer steps of the run"""
    seed: int = 0
    """seed of initial weights and dropout (data.seed is the seed of the data)"""
    log_every: PositiveInt = 10
    """optimizer steps between two lines of the console and of metrics.jsonl"""

    def __post_init__(self) -> None:
        if not self.folder:
            raise UserError("run.folder is empty: give a folder, such as runs/first")


@dataclass
class TrackingSettings:
    """Experiment tracker besides TensorBoard; docs/monitoring.md."""

    name: Literal["none", "wandb", "trackio"] = "none"
    """Weights & Biases, or trackio; both need requirements-tracking.txt. A failing tracker never ends a run"""
    project: str = "bestrq"
    """project of the tracker"""
    online: bool = False
    """wandb: send to its server; otherwise the lines stay in RUN/tracking for `wandb sync`. trackio is always local,
    unless its variable TRACKIO_SPACE_ID is set"""


@dataclass
class ProfileSettings:
    """Trace of some optimizer steps by torch.profiler, in RUN/profile; docs/monitoring.md."""

    first_step: NonNegativeInt = 0
    """first optimizer step of the trace, such as 20, after compilation and warm-up; 0: no trace"""
    steps: PositiveInt = 3
    """optimizer steps of the trace; a trace takes some 10 MB per step"""
    all_ranks: bool = False
    """trace of every rank; otherwise of rank 0"""


@dataclass
class NormSettings:
    """Norms of gradients and activations by module, in metrics.jsonl as kind "norms"; docs/monitoring.md."""

    every_steps: NonNegativeInt = 0
    """optimizer steps between two lines; 0: none"""
    detail: Literal["blocks", "layers"] = "blocks"
    """blocks of the encoder as a whole, or also their layers"""


class RunFolder:
    """Paths of a run, and the checks and record of its starts."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.record = self.path / "run.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.export = self.path / "export"
        self.pictures = self.path / "pictures"
        self._lock: RunLock | None = None

    def start(
        self, settings: Any, world: World, free: Collection[str] = (), fingerprints: Mapping[str, str] | None = None,
        places: Mapping[str, str] | None = None, origins: Mapping[str, Callable[[], str]] | None = None,
        facts: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Create the folder, or check that the run in it can be resumed; called by all ranks, executed by rank 0.

        A field of all items of a list is written `data.mixture[].dataset`.

        Args:
            settings: the script's dataclass.
            free: fields and sections (`run.steps`, `checkpoint`) that may change when a run is resumed.
            fingerprints: of the data, by name (`dataset`, `features.num_mels`); they may not change.
            places: field that holds the location of data -> name of the data's fingerprint. The field may change if
                that fingerprint was recorded, because data may be moved.
            origins: field that holds the location of initial weights (`finetune.init`) -> function that computes their
                fingerprint. Called before the first checkpoint, and later only if the field has changed.
            facts: further values for run.json.

        Raises:
            UserError: on all ranks, if a fixed field or fingerprint has changed, the folder is not writable, or another
                process trains in it.
        """
        from bestrq.training.run_lock import RunLock  # a reader of the loop need not read these
        from bestrq.training.start_record import describe_start

        problem = None
        if world.is_main:
            try:
                values, defaults = to_dict(settings), to_dict(type(settings)())
                initial = self._check_resume(values, defaults, free, fingerprints or {}, places or {}, origins or {})
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = RunLock(self.path)
                for folder in (self.path, self.pictures, self.path / "averaging"):  # checkpoints: `latest_checkpoint`
                    remove_leftovers(folder)
                save_yaml(values, self.config)
                start = {**describe_start(world, {**(fingerprints or {}), **initial}), **(facts or {})}
                write_file(self.record, json.dumps({"starts": [*self.starts(), start]}, indent=1))
            except (UserError, OSError) as error:
                problem = str(error) if isinstance(error, UserError) else f"cannot write the run folder: {error}"
        problem = world.broadcast(problem)
        if problem is not None:
            raise UserError(problem)

    def close(self) -> None:
        """Release the lock, so that another process may continue the run; otherwise it ends with the process."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _check_resume(
        self, values: dict[str, Any], defaults: dict[str, Any], free: Collection[str],
        fingerprints: Mapping[str, str], places: Mapping[str, str], origins: Mapping[str, Callable[[], str]],
    ) -> dict[str, str]:  # fmt: skip
        """Compare the settings with those of the run in the folder, if any. Returns the fingerprints of `origins`."""
        from bestrq.training.setting_changes import differences, same_path, with_defaults

        starts = self.starts()
        recorded: dict[str, str] = starts[-1].get("fingerprints", {}) if starts else {}
        trained = self._has_checkpoints()
        if trained and not self.config.exists():
            raise UserError(f"{self.path} holds checkpoints but no config.yaml: choose another run folder")
        if not trained:  # no checkpoint yet: any configuration may start
            return {name: fingerprint() for name, fingerprint in origins.items()}
        fingerprint_of = {**places, **{field: field for field in origins}}  # field -> name of its fingerprint
        changes = [
            change
            for change in differences(with_defaults(load_yaml(self.config), defaults), values, free)
            if not (change.pattern in fingerprint_of and same_path(change.before, change.after))
        ]
        moved = {change.field: change for change in changes if fingerprint_of.get(change.pattern) in recorded}
        if refused := [str(change) for change in changes if change.field not in moved]:
            raise UserError(
                f"the run in {self.path} started with another configuration: {'; '.join(refused)}. "
                "Restore the old value, or choose another run folder"
            )
        initial = {name: origins[name]() for name in origins if name in moved}
        for name, fingerprint in {**fingerprints, **initial}.items():
            if recorded.get(name, fingerprint) != fingerprint:
                reasons = [
                    f" ({change})"
                    for change in moved.values()
                    if name in (change.field, fingerprint_of[change.pattern])
                ]
                raise UserError(
                    f"the run in {self.path} started with {name} {recorded[name]}, and now it is {fingerprint}"
                    f"{''.join(reasons)}: restore the old data, or choose another run folder"
                )
        return {name: recorded[name] for name in origins if name in recorded}

    def recorded_setting(self, section: str, name: str) -> Any:
        """Setting recorded by the run in this folder; None before the first checkpoint or if config.yaml is unreadable.

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

    def starts(self) -> list[dict[str, Any]]:
        """Entries of run.json, oldest first; [] without it. Raises UserError if it is damaged."""
        if not self.record.exists():
            return []
        try:
            starts = as_object(read_json(self.record), self.record)["starts"]
            for start in starts:
                as_object(as_object(start, "a start").get("fingerprints", {}), "fingerprints")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"cannot read {self.record}: {error!r}. Move it elsewhere to continue without it"
            ) from error
        return list(starts)
