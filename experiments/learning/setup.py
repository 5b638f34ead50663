"""Settings of the experiment on pretraining: folder, data, cells."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from experiments.learning.stages import Settings, Size

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Cell:
    """One training of a stage."""

    language: str
    """empty: recordings without a language"""
    minutes: float
    seed: int

    def __str__(self) -> str:
        return f"{self.language or 'all'}-{self.minutes:g}min-s{self.seed}"


@dataclass(frozen=True)
class Setup:
    """Everything that determines the jobs."""

    folder: Path
    """of all outputs"""
    dataset: Path
    languages: tuple[str, ...]
    size: Size
    minutes: tuple[float, ...]
    seeds: tuple[int, ...]
    systems: tuple[str, ...]
    pretrained: Path | None = None
    """export that replaces the shared pretraining"""
    pretrained_seconds: float = 0.0
    """processor seconds that it took"""
    settings: Settings = field(default_factory=dict)
    """further settings of pretraining, from the command line"""

    @property
    def main_minutes(self) -> float:
        """Amount of labels for the grids and the main results: 30 minutes, or the nearest."""
        return min(self.minutes, key=lambda minutes: abs(minutes - 30))

    def cells(self, minutes: float) -> list[Cell]:
        return [Cell(language, minutes, seed) for seed in self.seeds for language in self.languages]

    @property
    def trial_cells(self) -> list[Cell]:
        """Cells in which candidates are compared: the first seed."""
        return [Cell(language, self.main_minutes, self.seeds[0]) for language in self.languages]
