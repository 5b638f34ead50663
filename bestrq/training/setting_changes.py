"""Differences between the recorded settings of a run and those of a new start."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from common.files import canonical_path


def with_defaults(old: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Recorded configuration with the defaults of fields added since, so that a run can be resumed after an upgrade."""
    sections = {
        name: with_defaults(section, value)
        for name, value in defaults.items()
        if isinstance(value, dict) and isinstance(section := old.get(name, {}), dict)  # else it differs
    }
    return {**defaults, **old, **sections}


@dataclass(frozen=True)
class Difference:
    field: str
    before: Any
    after: Any

    @property
    def pattern(self) -> str:
        """Field name without list indices: `data.mixture[].dataset`."""
        return re.sub(r"\[\d+\]", "[]", self.field)

    def __str__(self) -> str:
        return f"{self.field} was {self.before!r}, is {self.after!r}"


def differences(before: Any, after: Any, free: Collection[str], field: str = "") -> list[Difference]:
    """Fields that differ and are not free. Lists of equal length are compared item by item."""
    if field in free or before == after:
        return []
    if isinstance(before, dict) and isinstance(after, dict):
        prefix = f"{field}." if field else ""
        inner = [(f"{prefix}{name}", before.get(name), after.get(name)) for name in {**before, **after}]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        inner = [(f"{field}[{number}]", *pair) for number, pair in enumerate(zip(before, after, strict=True))]
    else:
        return [Difference(field, before, after)]
    return [difference for name, old, new in inner for difference in differences(old, new, free, name)]


def same_path(before: Any, after: Any) -> bool:
    """Whether two values name the same path: relative, with a trailing slash, through a link."""
    are_paths = isinstance(before, str) and isinstance(after, str)
    return are_paths and canonical_path(before) == canonical_path(after)
