"""Label text: the normalised form of a transcript, for training targets and scoring.

A label consists of letters, digits, their marks, and apostrophes within words. References and hypotheses are
converted to labels before normalisation, so a transcript and its own label always get the same score.

In English the number symbols of Whisper's normaliser are written as words: "$3.1 million" becomes "3 point 1 million
dollars", "1,000" becomes "1000". `with_symbols` restores the symbols for the normaliser, so "five percent" still equals
"5%".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import islice

from common.languages import language_code

BRACKET_WORDS = 5
"""Maximum number of words removed with a pair of brackets, so that a stray bracket does not remove a sentence."""
BRACKET_CHARACTERS = 40
"""Maximum number of characters removed with a pair of brackets."""
BRACKET_UNSPACED = 20
"""Maximum number of removed characters of scripts without spaces between words."""

# Placeholder for a space inserted within a word. Like all punctuation, it becomes a space in the end.
_GAP = "_"
# Unicode's Default_Ignorable_Code_Point: soft hyphen, joiners, marks of direction, BOM, variation selectors, fillers.
_INVISIBLE = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200c-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
# Quotation marks and primes, accents and modifier letters, the Armenian apostrophe, the Hebrew geresh.
_APOSTROPHES = "\u2018\u2019\u201b\u2032\u2035\uff07`\u00b4\u02b9\u02bc\u02bd\u02c8\u02ca\u02cb\ua78b\ua78c\u055a\u05f3"
# The okina is a letter in these languages, even at the start of words; in all others it is an apostrophe.
_OKINA, _OKINA_LANGUAGES = "\u02bb", frozenset(("haw", "sm", "to", "ty"))
# Malayalam's final consonants: consonant, virama and joiner before Unicode 5.1, single characters since.
_CHILLU = dict(zip("\u0d23\u0d28\u0d30\u0d32\u0d33\u0d15", "\u0d7a\u0d7b\u0d7c\u0d7d\u0d7e\u0d7f", strict=True))
_CHILLU_SPELLED = re.compile(f"([{''.join(_CHILLU)}])\u0d4d\u200d")
_INVISIBLE_PATTERN = re.compile(f"[{_INVISIBLE}]")
# The zero-width space is invisible too, but separates words.
_FOLDED = str.maketrans(dict.fromkeys(_APOSTROPHES, "'") | {"\u200b": _GAP})

_INSIDE = r"[^\[\](){}<>\uff08\uff09\uff3b\uff3d\u3010\u3011]"
_OPENING = re.compile(r"[\[({<\uff08\uff3b\u3010]")
_BRACKETS = re.compile(
    "|".join(
        f"\\{pair[0]}({_INSIDE}*)\\{pair[1]}"
        for pair in ("[]", "{}", "()", "\uff08\uff09", "\uff3b\uff3d", "\u3010\u3011")
    )
    # A tag of one word, or of several words that are not attached to another. "x < y and a > b" has no tag.
    + rf"|<((?:(?!\s){_INSIDE})+)>|(?<!\w)<((?=[^\W\d_]){_INSIDE}*(?<!\s))>(?!\w)"
)
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_SENTENCE_END = re.compile(r"[.!?\u2026\u061f]\s|[\u0964\u3002\uff01\uff1f]")

_DIGIT = re.compile("[0-9]")
_CURRENCIES = {"$": "dollar", "\u00a3": "pound", "\u20ac": "euro", "\u00a2": "cent"}
_WIDE_SYMBOLS = str.maketrans("\uff05\ufe6a\uff04\ufe69\uffe1\uffe0", "%%$$\u00a3\u00a2")
# Commas between thousands or, as in India, between lakhs.
_THOUSANDS = re.compile(r",(?<=[0-9],)(?=[0-9]{3}(?![0-9])|[0-9]{2},[0-9])")
_SYMBOL = f"([{''.join(_CURRENCIES)}])"
_SCALE = r"((?:[ -](?:hundred|thousand|million|billion|trillion)\b)*)"
_AMOUNT = rf"([0-9]+(?:\.[0-9]+)*|\.[0-9]+){_SCALE}"
_PRICE = re.compile(rf"{_SYMBOL}( ?){_AMOUNT}|(?<![.0-9]){_AMOUNT}( ?){_SYMBOL}(?! ?[.0-9])")
_PERCENT = re.compile(r"(?<=[0-9])( ?)%")
_POINT = re.compile(r"\.(?=[0-9])(?:(?<=[0-9]\.)|(?<![^\W_]\.)(?<!\.\.))")
_SPOKEN_POINT, _SPOKEN_PERCENT = re.compile(r"(?<=[0-9]) point (?=[0-9])"), re.compile(r"(?<=[0-9]) percent\b")
_SPOKEN_PRICE = re.compile(rf"(?<![.0-9])([0-9]+(?:\.[0-9]+)*){_SCALE} ({'|'.join(_CURRENCIES.values())})s?\b")
_CLITIC = re.compile(r"(?<=[^\W_]) '(s|m|d|t|re|ve|ll)(?![\w'])")


class _Letters(dict[int, str]):
    """Table for `str.translate`: excluded characters become line feeds, which differ from spaces between words."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kept = character in " '" or character.isalnum() or unicodedata.category(character).startswith("M")
        self[code] = character if kept else "\n"
        return self[code]


_LETTERS = _Letters()


def label_text(text: str, language: str = "") -> str:
    """Label of a text: NFC, lower case, words of letters, digits and in-word apostrophes.

    Other characters separate words ("ice-cream" is two words) and become one space. Invisible characters and short
    texts in brackets are removed: "[laughter]", "<unk>", "(inaudible)". Marks of letters and the dotless i of Turkish
    and Azerbaijani are kept. Symbols of English numbers are written as words (see the module). The label may be empty.
    The function is idempotent.

    Args:
        language: code or name, as in `common.languages`.
    """
    return " ".join(filter(None, _labels(text.split(), language)))


def label_words(words: Sequence[str], language: str = "") -> list[str]:
    """Labels of the words of a text, one per word; empty for words without a label, such as punctuation.

    Joined, they equal `label_text` of the text. The label of a word depends on its neighbours: "[background
    noise]" is removed, and "$3 million" gives "3" and "million dollars".
    """
    # Words may contain white space: their parts are counted and joined again.
    counts = [len(word.split()) for word in words]
    labels = iter(_labels(" ".join(words).split(), language))
    return [" ".join(filter(None, islice(labels, count))) for count in counts]


def _labels(words: list[str], language: str) -> list[str]:
    """`label_words` of words without white space."""
    code = language_code(language)
    text = fold(" ".join(words), code)
    if code in ("tr", "az"):
        text = text.replace("I", "\u0131").replace("\u0130", "i")
    text = text.lower()
    if _OPENING.search(text):
        text = _BRACKETS.sub(_replace_brackets, text)
    if code == "en":
        text = _spell_symbols(text)
    # NFC again: some capitals are a letter and a mark in lower case, and a removed bracket may precede a mark.
    text = unicodedata.normalize("NFC", text).translate(_LETTERS)
    return [word if word.isalnum() else _strip_apostrophes(word) for word in text.split(" ")]


def fold(text: str, language: str = "") -> str:
    """Text in NFC, with every variant of the apostrophe as ' and without invisible characters."""
    if text.isascii():
        return text.replace("`", "'")
    text = unicodedata.normalize("NFC", text)
    text = _CHILLU_SPELLED.sub(lambda match: _CHILLU[match[1]], text)
    text = _INVISIBLE_PATTERN.sub("", text).translate(_FOLDED)
    if language_code(language) not in _OKINA_LANGUAGES:
        text = text.replace(_OKINA, "'")
    return unicodedata.normalize("NFC", text)


def with_symbols(label: str) -> str:
    """Restore number symbols in an English label: "3 point 1 million dollars" gives "$3.1 million".

    Words that follow a spelled-out number ("five percent") are kept.
    """
    label = _SPOKEN_PERCENT.sub("%", _SPOKEN_POINT.sub(".", label))
    symbols = {name: symbol for symbol, name in _CURRENCIES.items()}
    return _SPOKEN_PRICE.sub(lambda match: f"{symbols[match[3]]}{match[1]}{match[2]}", label)


def _replace_brackets(match: re.Match[str]) -> str:
    """Replacement for a text in brackets: its spaces, or the text itself if it is too long for an annotation."""
    inside = next(group for group in match.groups() if group is not None).strip()
    too_long = (
        len(inside.split()) > BRACKET_WORDS
        or len(inside) > BRACKET_CHARACTERS
        or len(_UNSPACED.findall(inside)) > BRACKET_UNSPACED
    )
    return match[0] if too_long or _SENTENCE_END.search(inside) else " " * match[0].count(" ")


def _spell_symbols(text: str) -> str:
    """Replace number symbols of a folded, lower-case English text by words; the number of spaces is unchanged."""
    if " '" in text:
        text = _CLITIC.sub(r"'\1 ", text)  # "it 's", as treebanks write
    if not _DIGIT.search(text):
        return text
    text = _THOUSANDS.sub("", text.translate(_WIDE_SYMBOLS))
    if any(symbol in text for symbol in _CURRENCIES):
        text = _PRICE.sub(_spell_price, text)
    text = _PERCENT.sub(lambda match: f"{match[1] or _GAP}percent{_GAP}", text)
    return _POINT.sub(f"{_GAP}point{_GAP}", text)


def _spell_price(match: re.Match[str]) -> str:
    before, space, amount, scale, amount_first, scale_first, space_first, after = match.groups("")
    amount, scale = amount or amount_first, scale or scale_first
    name = _CURRENCIES[before or after] + ("" if amount == "1" and not scale else "s")
    return f"{space or _GAP}{amount}{scale}{space_first or _GAP}{name}{_GAP}"


def _strip_apostrophes(word: str) -> str:
    # An apostrophe within a word belongs to its spelling; at the edge it counts as a quotation mark.
    parts = (part.strip("'") for part in word.split())
    return " ".join(part for part in parts if any(map(str.isalnum, part)))
