"""Options of the training scripts that preview a run instead of starting it: `--dry_run` and `--fit`.

They are not settings of a run: its config.yaml does not hold them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt

from common.config import parse_sections

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class DryRunSettings:
    """One step on simulated GPUs, without a GPU and without data: prints memory and communication of a process."""

    world_size: NonNegativeInt = 0
    """number of processes, each with a GPU; 0: no dry run"""
    local_size: PositiveInt = 8
    """processes of a node, the default of distributed.shard_size"""


@dataclass(frozen=True)
class FitSettings:
    """Search for the largest number of rows that fit on a GPU: prints a table and the settings to use."""

    on_device: bool = False
    """by trials on the GPU of this machine; `--fit` alone is the same"""
    memory_gib: NonNegativeFloat = 0.0
    """by dry runs, for a GPU of this memory in GiB, as nvidia-smi shows it; no GPU is needed. The number of processes
    is dry_run.world_size, by default 1"""


def parse_or_preview(config_class: type[Settings], description: str | None) -> Settings | None:
    """Settings of a training run from the command line, or None after a preview, which has been printed.

    Raises UserError as `common.config.parse`, and for a run that cannot be previewed.
    """
    arguments = with_bare_fit(sys.argv[1:])
    sections: dict[str | None, list[type]] = {None: [config_class], "dry_run": [DryRunSettings], "fit": [FitSettings]}
    config, dry_run, fit = parse_sections(sections, arguments, description)
    if fit.on_device or fit.memory_gib:
        from pipelines.fit import report as report_fit

        report_fit(config, fit.memory_gib, dry_run.world_size or 1, dry_run.local_size)
    elif dry_run.world_size:
        from pipelines.dry_run import report as report_step

        report_step(config, dry_run.world_size, dry_run.local_size)
    else:
        return config
    return None


def with_bare_fit(arguments: Sequence[str]) -> list[str]:
    """Arguments with `--fit` alone written as the option that it stands for."""
    return ["--fit.on_device=true" if argument == "--fit" else argument for argument in arguments]
