"""Text normalisation of references and hypotheses before scoring, by language.

Both texts are first converted to labels (`common.text.label_text`), like the references of training, so a hypothesis
equal to the label of a text has no errors in any language. Then come the rules of the language, stored as data so that
a report can list them, and one of Whisper's normalisers (Radford et al. 2022, appendix C). Names: `whisper-english` and
`whisper-basic` are Whisper's; `unicode` is this project's for all other languages; `unicode+xx` is `unicode` after the
rules of the language xx.

Differences from Whisper's normaliser: docs/evaluation.md.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from common.errors import UserError
from common.languages import is_unspaced, language_code
from common.text import label_text, with_symbols

RULES_VERSION = "2"
"""incremented if the normalised form of any text may change; rates of different versions are not compared"""

Choice = Literal["auto", "whisper-english", "whisper-basic", "unicode"]
"""auto: `whisper-english` for English, else `unicode` with the language's rules; the others apply to all languages"""


@dataclass(frozen=True)
class Rule:
    """Replacement in one language, for words with two spellings."""

    pattern: str
    """regular expression, matched against labels; \\u escapes"""
    replacement: str
    reason: str


@dataclass(frozen=True)
class Normaliser:
    """Text normalisation with its name and description."""

    name: str
    description: str
    rules: tuple[Rule, ...]
    clean: Callable[[str], str]
    """text to text with single spaces"""
    unspaced: bool = False
    """the language is written without spaces: each character is a word, and spaces are not counted as characters"""

    def facts(self) -> dict[str, Any]:
        """JSON-able description for the report."""
        return {"description": self.description, "rules": [asdict(rule) for rule in self.rules]}


RULES: dict[str, tuple[Rule, ...]] = {
    "ar": (
        Rule("[\\u064B-\\u0652\\u0670\\u0640]", "", "vowel marks and tatweel are optional"),
        Rule("[\\u0622\\u0623\\u0625]", "\u0627", "alef is written with or without hamza and madda"),
    ),
    "de": (Rule("[\\u00DF\\u1E9E]", "ss", "sharp s is ss in Switzerland and in capitals"),),
    "fr": (
        Rule("(?i)\\u0153", "oe", "the ligature is optional"),
        Rule("(?i)\\u00E6", "ae", "the ligature is optional"),
    ),
    "he": (Rule("[\\u05B0-\\u05BC\\u05C1\\u05C2\\u05C7]", "", "vowel points are optional"),),
    "ro": (
        Rule("[\\u0163\\u0162]", "\u021b", "t with cedilla stands for t with comma in older texts"),
        Rule("[\\u015F\\u015E]", "\u0219", "s with cedilla stands for s with comma in older texts"),
    ),
    "ru": (Rule("(?i)\\u0451", "\u0435", "yo is mostly written as ye"),),
    "uk": (Rule("(?<=\\w)'(?=\\w)", "\u02bc", "the apostrophe is part of a word"),),
}
RULES["be"] = RULES["uk"]
_LABEL = (
    "labels: apostrophe variants unified, invisible characters and short texts in brackets removed, lower case, "
    "punctuation replaced by spaces"
)
_UNICODE = f"{_LABEL}; NFKC, apostrophes replaced by spaces, combining marks kept"
# A repeating recogniser may write any number of digits; Whisper's rules fail from 4,300 digits on.
_LONG_RUN = re.compile(r"(\w{1000})(?=\w)")


@cache
def normaliser(language: str, choice: Choice = "auto") -> Normaliser:
    """Normaliser of a language, given by any code or name in `common.languages`.

    A language without rules and an unknown one ("") get `unicode`. Raises UserError for an unknown choice.
    """
    code = language_code(language)
    if choice == "whisper-english" or (choice == "auto" and code == "en"):
        description = (
            f"{_LABEL}, numbers and their symbols as words; then Whisper's English normaliser: numbers, "
            "contractions, fillers, British spelling"
        )
        return Normaliser("whisper-english", description, (), _labelled(_english(), code))
    if choice == "whisper-basic":
        description = "Whisper's normaliser for all languages: like `unicode`, but combining marks become spaces too"
        return Normaliser("whisper-basic", description, (), _labelled(BasicTextNormalizer(), code))
    unspaced = is_unspaced(code)
    if choice == "unicode" or (choice == "auto" and code not in RULES and not unspaced):
        return Normaliser("unicode", _UNICODE, (), _labelled(BasicTextNormalizer(preserve_marks=True), code))
    if choice != "auto":
        raise UserError(f"normaliser = {choice!r}: give auto, whisper-english, whisper-basic or unicode")
    rules = RULES.get(code, ())
    description = f"{_UNICODE}; every character counts as a word" if unspaced else f"{_UNICODE}; preceded by the rules"
    basic = BasicTextNormalizer(preserve_marks=True, split_letters=unspaced)
    return Normaliser(f"unicode+{code}", description, rules, _labelled(_with_rules(rules, basic), code), unspaced)


def normalisers_used(names_and_languages: Iterable[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Descriptions of the normalisers of a corpus, for a report.

    Args:
        names_and_languages: name of the normaliser and language of each recording.

    Returns:
        By name: description, rules and languages, and for `unicode` a note with the languages without rules.
    """
    languages: dict[str, set[str]] = {}
    for name, language in names_and_languages:
        languages.setdefault(name, set()).add(language)
    used = {}
    for name in sorted(languages):
        codes = sorted(languages[name])
        choice: Any = "auto" if "+" in name else name
        used[name] = {**normaliser(codes[0], choice).facts(), "languages": codes}
        if name == "unicode":
            listed = ", ".join(code or "not given" for code in codes)
            used[name]["note"] = f"languages without specific rules: {listed}"
    return used


def _labelled(clean: Callable[[str], str], language: str) -> Callable[[str], str]:
    return lambda text: " ".join(clean(label_text(text, language)).split())


def _english() -> Callable[[str], str]:
    whisper = EnglishTextNormalizer()
    return lambda label: whisper(with_symbols(_LONG_RUN.sub(r"\1 ", label)))


def _with_rules(rules: tuple[Rule, ...], clean: Callable[[str], str]) -> Callable[[str], str]:
    compiled = [(re.compile(rule.pattern), rule.replacement) for rule in rules]

    def normalise(text: str) -> str:
        for pattern, replacement in compiled:
            text = pattern.sub(replacement, text)
        return clean(text)

    return normalise
