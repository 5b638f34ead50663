"""Checks of the types of JSON values that other programs may have written or changed.

A check is a function of a value and its place, which raises UserError, with the place and the fix, for any other value.
Checks are combined to describe a whole document: `fields({"name": text, "rates": list_of(number)})`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_json_object

Check = Callable[[Any, str], None]
LARGEST = 10**15
"""greatest number, in magnitude; beyond it, sums of integers are not exact in floating point"""


def text(value: Any, place: str) -> None:
    """Unicode text, so that it can be printed and written."""
    if not isinstance(value, str):
        raise _wrong(value, place, "text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _wrong(value, place, "Unicode text") from None


def number(value: Any, place: str) -> None:
    """Finite number of at most LARGEST."""
    if type(value) not in (int, float) or not abs(value) <= LARGEST:  # false for NaN
        raise _wrong(value, place, "a number")


def real(value: Any, place: str) -> None:
    """Number of at most LARGEST, infinite, or not a number."""
    if type(value) not in (int, float) or LARGEST < abs(value) < float("inf"):
        raise _wrong(value, place, "a number")


def positive_or_zero(value: Any, place: str) -> None:
    """Number, 0 or more."""
    number(value, place)
    if value < 0:
        raise _wrong(value, place, "a number, 0 or more")


def count(value: Any, place: str) -> None:
    """Integer from 0 to LARGEST."""
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise _wrong(value, place, "an integer, 0 or more")


def scalar(value: Any, place: str) -> None:
    """Text, number, boolean or null."""
    if isinstance(value, str):
        text(value, place)
    elif value is not None and not isinstance(value, bool):
        number(value, place)


def one_of(*values: str) -> Check:
    """One of these texts."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, str) or value not in values:
            raise _wrong(value, place, f"one of {', '.join(map(repr, values))}")

    return check


def or_null(inner: Check) -> Check:
    """Null, or a value that passes the check."""

    def check(value: Any, place: str) -> None:
        if value is not None:
            inner(value, place)

    return check


def list_of(inner: Check, shortest: int = 0) -> Check:
    """List of values that all pass the check, with at least `shortest` of them."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, list) or len(value) < shortest:
            raise _wrong(value, place, f"a list{f' of at least {shortest}' if shortest else ''}")
        for index, item in enumerate(value):
            inner(item, f"{place}[{index}]")

    return check


def row_of(*inner: Check) -> Check:
    """List with one value for every check."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, list) or len(value) != len(inner):
            raise _wrong(value, place, f"a list of {len(inner)}")
        for index, (item, of_item) in enumerate(zip(value, inner, strict=True)):
            of_item(item, f"{place}[{index}]")

    return check


def mapping_of(inner: Check) -> Check:
    """Object with any names, whose values all pass the check."""

    def check(value: Any, place: str) -> None:
        _object(value, place)
        for name, item in value.items():
            text(name, f"a name in {place}")
            inner(item, f"{place}.{name}")

    return check


def fields(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """Object with these fields; others are not checked."""

    def check(value: Any, place: str) -> None:
        _object(value, place)
        separator = ": " if place.endswith((".json", ".jsonl")) or ", line " in place else "."
        for name, inner in {**required, **(optional or {})}.items():
            if name in value:
                inner(value[name], f"{place}{separator}{name}")
            elif name in required:
                raise UserError(f"{place}{separator}{name} is missing")

    return check


def finite(value: Any, place: str) -> None:
    """Value of any type without NaN and infinity, at any depth, so that it can be written as JSON."""
    rest = [(value, f"{place}: ")]
    while rest:
        part, where = rest.pop()
        if isinstance(part, float) and not math.isfinite(part):
            raise UserError(f"{where.rstrip(': ')} is the number {part}, which is not JSON")
        items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
        rest += [(inner, f"{where}{'' if where.endswith(' ') else '.'}{name}") for name, inner in items]


def read_number(path: Path, *names: str) -> float:
    """Number in a JSON file, in nested objects of these names. Raises UserError with file and names."""
    value: Any = read_json_object(path)
    place = f"{path}: {'.'.join(names)}"
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    number(value, place)
    return float(value)


def _object(value: Any, place: str) -> None:
    if not isinstance(value, dict):
        raise _wrong(value, place, "an object")


def _wrong(value: Any, place: str, expected: str) -> UserError:
    try:
        shown = repr(value)
    except (RecursionError, ValueError):  # deep nesting; integers of more than 4,300 digits
        shown = type(value).__name__
    return UserError(f"{place} is {shown if len(shown) <= 60 else shown[:57] + '...'}, expected {expected}")
