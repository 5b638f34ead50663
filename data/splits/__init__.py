"""Published lists of dev and test recordings, one JSON file a corpus, each with its source."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType


@functools.cache
def published_split(corpus: str) -> Mapping[str, tuple[str, ...]]:
    """Split name -> ids of its recordings, as published; `corpus` names a file beside this module.

    The files are part of the program: a missing or a wrong one is a bug, not a user's mistake.
    """
    fields = json.loads((Path(__file__).parent / f"{corpus}.json").read_text(encoding="utf-8"))
    return MappingProxyType({split: tuple(ids) for split, ids in fields["splits"].items()})
