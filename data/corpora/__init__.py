"""The corpora, one module each, and the one table of their names."""

from __future__ import annotations

from data.corpora import synthetic
from data.corpora.base import Corpus, did_you_mean
from data.errors import DataError

CORPORA: dict[str, Corpus] = {
    "synthetic": Corpus(
        "speech made by espeak-ng: many voices, seven languages, exact word times; needs nothing but this project",
        synthetic.SyntheticSettings,
        synthetic.sources,
    ),
}


def find_corpus(name: str) -> Corpus:
    """The corpus of that name. Raises DataError with the nearest name for an unknown one."""
    if name not in CORPORA:
        raise DataError(f"there is no corpus {name!r}: known are {', '.join(CORPORA)}.{did_you_mean(name, list(CORPORA))}")
    return CORPORA[name]
