"""Systematic damage to JSON: every field replaced by wrong values, or deleted; for fuzz tests of readers."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

from common.errors import UserError

DEEP: Any = reduce(lambda inner, _: [inner], range(200), None)
WRONG = [
    None, True, 0, -1, 1.5, 10**18, 10**400, -(10**30), float("nan"), float("inf"), "", "x", "-1", "\ud800", "a\0b",
    "../../x", "x" * 5000, [], [[]], {}, [None], {"x": None}, [1, 2, 3], ["x", "y"], DEEP,
]  # fmt: skip
DELETED = object()
Path = tuple[str | int, ...]


def places(value: Any, path: Path = ()) -> Iterator[Path]:
    """Paths of all parts of a JSON value, the whole included; of a list, those of the first two items."""
    yield path
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from places(inner, (*path, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value[:2]):
            yield from places(inner, (*path, index))


def variants(valid: Any, most: int = 2000, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Description and text of damaged copies: at most `most` of them, chosen at random with a fixed seed.

    Every place is in several of them, as long as `most` is more than the number of places.
    """
    cases = [(path, value) for path in places(valid) for value in (*WRONG, DELETED) if path or value is not DELETED]
    random.Random(seed).shuffle(cases)
    seen: dict[Path, int] = {}
    for path, _ in cases:
        seen[path] = 0
    # First the places that have been seen least, so that none is left out.
    ranked = []
    for path, value in cases:
        ranked.append((seen[path], path, value))
        seen[path] += 1
    ranked.sort(key=lambda case: case[0])
    for _, path, value in ranked[:most]:
        changed = copy.deepcopy(valid)
        if not path:
            changed = value
        else:
            inner = reduce(lambda part, name: part[name], path[:-1], changed)
            if value is DELETED:
                del inner[path[-1]]
            else:
                inner[path[-1]] = value
        shown = "deleted" if value is DELETED else "deep" if value is DEEP else repr(value)[:30]
        yield f"{'.'.join(map(str, path))} = {shown}", json.dumps(changed)


def refused(read: Callable[[], object], case: str, named: str) -> bool:
    """Whether a reader raises UserError, which must contain `named`; any other exception is an error of the test."""
    try:
        read()
    except UserError as error:
        assert named in str(error), f"{case}: {error}"
        return True
    except Exception as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
    return False
