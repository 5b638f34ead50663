"""Speech of the experiment: preparation, languages with labels, and checks that test is clean."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from data.format.dataset import Dataset
from experiments.jobs import Job
from experiments.learning.choices import arguments

DEFAULT_LANGUAGES = ("cs", "nl")
HELD_OUT_SHARE = 0.145
"""share of the phrases in dev and in test for a corpus without splits, as in debian_voices"""
FEWEST_RECORDINGS = 8
"""of dev and of test in each language: fewer give no bootstrap intervals"""


@dataclass(frozen=True)
class LanguageFacts:
    """Amounts of a language."""

    train_minutes: float
    """with transcripts"""
    dev_recordings: int
    test_recordings: int
    test_minutes: float
    shared_speakers: int
    """speakers of test who are also in train"""


def preparation(corpus: str, languages: Sequence[str], folder: Path, tiny: bool) -> tuple[Job | None, Path]:
    """Job that prepares the dataset (None if `corpus` is a dataset), and the folder of the dataset.

    Args:
        corpus: dataset, NeMo manifest, folder with audio and .txt files; empty: speech of Debian packages, or with
            `tiny` a few synthetic recordings.
    """
    out = folder / "dataset"
    path = Path(corpus).expanduser().resolve() if corpus else None
    if path is not None and (path / "dataset.json").is_file():
        return None, path
    held_out = {"dev_share": HELD_OUT_SHARE, "test_share": HELD_OUT_SHARE}
    if path is not None:
        if not path.exists():
            raise UserError(f"--folder {corpus}: there is no such dataset, manifest or folder")
        name = "folder"
        values: dict[str, Any] = {"folder" if path.is_dir() else "manifest": path, "text": "optional", **held_out}
    elif tiny:
        name, values = "synthetic", {"languages": ",".join(languages or DEFAULT_LANGUAGES), "train_hours": 0.06}
        values |= {"train_long_share": 0, "dev_utterances": 16, "test_utterances": 16, "test_long_recordings": 0}
    else:
        if unknown := [language for language in languages if language not in DEFAULT_LANGUAGES]:
            raise UserError(
                f"--languages {unknown[0]}: the speech of the Debian packages has dev and test in cs and nl; give "
                "these, or --folder with another corpus"
            )
        name, values = "debian_voices", {"held_out_languages": ",".join(DEFAULT_LANGUAGES), **held_out}
    command = (sys.executable, "-m", "data.prepare", name, *arguments({**values, "out": out}))
    return Job("dataset", command, out / "dataset.json", kind="dataset", guess=120.0, counted=False), out


def choose_languages(dataset: Dataset, wanted: Sequence[str], smallest_minutes: float) -> dict[str, LanguageFacts]:
    """Languages of the experiment, most labels first: the wanted ones, else the two with the most labels.

    Raises UserError if one lacks dev, test or labels, or if a text of dev or test is in another split.
    """
    known = sorted({str(name) for name in dataset.labels("language")[0]})
    if len(known) > 1:
        known = [language for language in known if language]  # "" would select all languages in a fine-tuning
    usable: dict[str, LanguageFacts] = {}
    problems: dict[str, str] = {}
    for language in wanted or known:
        facts = describe_language(dataset, language)
        if problem := unusable(facts, smallest_minutes):
            problems[language] = problem
        else:
            usable[language] = facts
    if bad := [language for language in wanted if language in problems]:
        raise UserError(f"--languages {bad[0]}: {dataset.location}: {problems[bad[0]]}")
    if not usable:
        reasons = "; ".join(f"{language or 'no language'}: {problem}" for language, problem in problems.items())
        raise UserError(
            f"{dataset.location} has no language for the experiment ({reasons}). Give recordings with transcripts in "
            "train, dev and test: `python -m data.shards split DIR --out NEW` makes splits by text"
        )
    most = sorted(usable, key=lambda language: -usable[language].train_minutes)
    chosen = {language: usable[language] for language in (wanted or most[:2])}
    for language in chosen:
        check_texts(dataset, language)
    return chosen


def describe_language(dataset: Dataset, language: str) -> LanguageFacts:
    rate = dataset.features.frames_per_second * 60
    train, dev, test = (recordings_of(dataset, split, language) for split in ("train", "dev", "test"))
    train_speakers, test_speakers = ({dataset.speaker(i) for i in numbers} - {""} for numbers in (train, test))
    return LanguageFacts(
        train_minutes=sum(int(dataset.frames[i]) for i in train if dataset.text(i)) / rate,
        dev_recordings=len(dev),
        test_recordings=len(test),
        test_minutes=sum(int(dataset.frames[i]) for i in test) / rate,
        shared_speakers=len(train_speakers & test_speakers),
    )


def recordings_of(dataset: Dataset, split: str, language: str) -> list[int]:
    """Numbers of the recordings; [] without any, which `Dataset.select` refuses."""
    keep = np.ones(len(dataset), bool)
    for name, value in (("split", split), ("language", language)):
        names, codes = dataset.labels(name)
        keep &= codes == (list(names).index(value) if value in names else -1)
    return np.flatnonzero(keep).tolist()


def unusable(facts: LanguageFacts, smallest_minutes: float) -> str:
    """Reason against a language, or ""."""
    if min(facts.dev_recordings, facts.test_recordings) < FEWEST_RECORDINGS:
        return (
            f"{facts.dev_recordings} recordings in dev and {facts.test_recordings} in test; at least "
            f"{FEWEST_RECORDINGS} are needed in both"
        )
    if facts.train_minutes < smallest_minutes:
        return (
            f"{facts.train_minutes:.1f} minutes with transcripts in train, and --minutes asks for {smallest_minutes:g}"
        )
    return ""


def check_texts(dataset: Dataset, language: str) -> None:
    """Raise UserError if a test recording has no transcript, or a text of dev or test is in another split too.

    Texts are compared by their letters and digits. A recogniser that has read the sentences of test is not tested.
    """
    texts = {
        split: {text_key(dataset.text(i) or ""): i for i in recordings_of(dataset, split, language)}
        for split in ("train", "dev", "test")
    }
    for split in ("dev", "test"):
        if "" in texts[split]:
            raise UserError(
                f"{dataset.location}: recording {dataset.id(texts[split][''])!r} of {split} has no transcript: keep "
                'such recordings in train ("split": "train" in a manifest), or remove all without a transcript with '
                "`python -m data.shards filter DIR --has-text --out NEW`"
            )
    for first, second in (("train", "test"), ("dev", "test"), ("train", "dev")):
        if shared := (texts[first].keys() & texts[second].keys()) - {""}:
            example = min(shared)
            raise UserError(
                f"{dataset.location}: {len(shared)} texts of {second} are also in {first} (language "
                f"{language or 'not given'}), such as {example!r} of {dataset.id(texts[second][example])!r}: make "
                "splits by text with `python -m data.shards split DIR --by text --out NEW`, and give --folder NEW"
            )


def text_key(text: str) -> str:
    """Letters and digits of a text, separated by spaces: the same for other cases and punctuation."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def usable_minutes(minutes: Sequence[float], languages: dict[str, LanguageFacts]) -> tuple[float, ...]:
    """Amounts of labels that every language has."""
    least = min(facts.train_minutes for facts in languages.values())
    return tuple(amount for amount in minutes if amount <= least)


def corpus_facts(dataset: Dataset, languages: dict[str, LanguageFacts]) -> dict[str, Any]:
    """Entry of the results."""
    train = dataset.select("train")
    return {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "hours_of_speech": float(dataset.frames[train].sum()) / dataset.features.frames_per_second / 3600,
        "languages": {language: asdict(facts) for language, facts in languages.items()},
    }
