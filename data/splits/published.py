"""Published lists of dev and test recordings, one JSON file per corpus, with its source."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType


@functools.cache
def published_split(corpus: str) -> Mapping[str, tuple[str, ...]]:
    """Published ids of recordings by split, from the file {corpus}.json of this folder."""
    fields = json.loads((Path(__file__).parent / f"{corpus}.json").read_text(encoding="utf-8"))
    return MappingProxyType({split: tuple(ids) for split, ids in fields["splits"].items()})
