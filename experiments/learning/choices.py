"""Commands with settings, and choices among settings by dev CER, which are written as files for --config."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from common.files import write_file, write_json
from common.json_checks import read_number
from experiments.learning.stages import Settings


def script(name: str, recipe: str, configs: Sequence[Path], values: Settings) -> tuple[str, ...]:
    """Command of a script in the repository's root. Later files override earlier ones, values all files."""
    files = [*([recipe] if recipe else []), *map(str, configs)]
    return (sys.executable, name, *(f"--config={file}" for file in files), *arguments(values))


def arguments(values: Settings) -> list[str]:
    """`--name=value` arguments; lists and dicts as JSON."""
    return [
        f"--{name}={json.dumps(value) if isinstance(value, list | dict | bool) else value}"
        for name, value in values.items()
    ]


def write_overlay(path: Path, values: Settings) -> None:
    """Write settings with dotted names as a file for --config."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *sections, last = name.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    write_file(path, yaml.safe_dump(nested, sort_keys=False))


def choose(
    candidates: Sequence[Settings], rates: Sequence[Sequence[Path]], read: Callable[[Path], float], out: Path
) -> None:
    """Write the candidate with the lowest mean dev CER, and the CERs of all beside it; the first of equal ones."""
    means = [mean(read(path) for path in paths) for paths in rates]
    best = means.index(min(means))
    tried = [{"settings": dict(c), "dev_cer": rate} for c, rate in zip(candidates, means, strict=True)]
    write_json(out.with_suffix(".json"), {"chosen": best, "candidates": tried})
    write_overlay(out, candidates[best])


def dev_cer_of_export(config: Path) -> float:
    """Dev CER of the exported checkpoint, the best of its run."""
    return read_number(config, "dev_cer")


def cer_of_results(results: Path) -> float:
    """CER over all recordings of an evaluation."""
    return read_number(results, "scores", "all", "cer")


def mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
