"""Label text: no errors against its own text in any language, removed brackets, English numbers; language codes."""

import random
import re
import sys
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from whisper_normalizer.english import EnglishTextNormalizer

from bestrq.report.text import language_text
from bestrq.scoring.breakdowns import align_timed
from bestrq.scoring.normalisers import RULES, Choice, normaliser
from bestrq.scoring.stm import ReferenceSegment, score_as_whole, score_by_segments
from bestrq.scoring.word_errors import score_recording
from bestrq.transcripts.words import TimedWord
from common.languages import _CODES, _NAMES, is_unspaced, language_code, language_name
from common.text import fold, label_text, label_words, with_symbols

CHOICES: tuple[Choice, ...] = ("auto", "whisper-english", "whisper-basic", "unicode")
APOSTROPHES = "'\u2018\u2019\u201b\u2032`\u00b4\u02bc\uff07"
INVISIBLE = "\u00ad\u200c\u200d\u200e\u200f\u202b\u2060\ufeff\ufe0f\u061c\u034f\u180e\U000e0061"
LANGUAGES = [*_NAMES, "", "xx", "azz", "haw", "en-GB", "tr_TR.UTF-8", "cmn-Hans-CN", "English", "Turkish", "tur", "ger"]

# Fragments of real texts, and characters with unusual case, composition and compatibility mappings.
PIECES = [
    "don't", "rock 'n' roll", "it 's", "Mr. Smith's", "gov't", "I'ma", "colour", "um",
    "uh-huh", "twenty one", "percent",
    "point", "dollars", "oh", "double", "and a half", "minus", "hundred", "million", "thousandth",
    "ones", "per", "cents",
    "5%", "5 %", "3.1 million", "1,000 people", "$20", "$3.1 million", "US$1,234.56",
    "20\u20ac", "\u00a35", "50\u00a2",
    "$1", ".5", "0.5", "2.0", "10-20", "1st", "1960s", "5'10", "1,00,000", "1,2,3", "192.168.1.1",
    "...5", "$", "%", ".",
    "[laughter]", "(inaudible)", "<unk>", "[background noise]", "(a b c d e f g)", "x < y", "a > b",
    "((noise))", "(", ")",
    "[", "]", "<", ">", "{SMACK}", "word(s)", "\uff08\u7b11\uff09", "a(b)\u0301", ":-)", "</i>",
    "DI\u015eARI", "I\u0130\u0131i", "I\u0307", "Stra\u00dfe", "\u1e9e", "\u039f\u0394\u039f\u03a3",
    "\u03a3.", "\u0128\u0300",
    "J\u0307\u0301", "\u0149", "\ufb01ne", "\u01c5", "m\u00b2", "\u00bd", "2\u00bd",
    "\u2167", "\u2126", "\uff15\uff05",
    "\u2460", "\u2116", "\u2122", "\U0001f469\u200d\U0001f4bb", "\u2764\ufe0f", "5\ufe0f\u20e3",
    "\u1fef", "\u1fbe", "e\u0301",
    "\u043f\u02bc\u044f\u0442\u044c", "\u043f\u2019\u044f\u0442\u044c", "\u0401\u043b\u043a\u0430",
    "Co\u00adope\u00adration",
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0623\u064e\u0628\u0640",
    "\u200f\u05e9\u05c1\u05b8\u05dc\u200e",
    "\u05e6\u05f3\u05e7", "\u0915\u094d\u200d\u0937", "\u0d05\u0d35\u0d28\u0d4d\u200d", "\u0d05\u0d35\u0d7b",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\u6211\u4eec\u662f\u3002", "\u30ab\u3099",
    "\uff76\uff9e", "\u1781\u17d2\u1798\u200b\u178f",
    "\u02bbokina", "C\u0152UR", "\u015ei \u0163ar\u0103", "c'h", "\u1100\u1161\u11a8", "\ud800", "\x00",
    "\x1f", "\u00a0", "\u3000",
]  # fmt: skip
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(PIECES),
        st.sampled_from([*APOSTROPHES, *INVISIBLE, *" .,-_&/\t\n", *"0123456789"]),
        st.text(max_size=6),
        st.text(st.characters(categories=["L", "M", "Nd", "No", "Nl"]), max_size=4),
        st.tuples(st.sampled_from("[(<{"), st.text("ab .\n", max_size=12), st.sampled_from("])>}")).map("".join),
        st.from_regex(r"[$\u20ac]?[0-9]{1,4}([.,][0-9]{1,3})?%?", fullmatch=True),
    ),
    max_size=12,
).flatmap(lambda parts: st.sampled_from(["", " "]).map(lambda between: between.join(parts)))  # fmt: skip


def assert_no_errors(text: str, language: str, choice: Choice = "auto") -> None:
    label = label_text(text, language)
    assert label_text(label, language) == label
    score = score_recording("x", text, label, language, choice=choice)
    assert (score.words.errors, score.characters.errors) == (0, 0), (language, choice, text, label, score.reference)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(text=TEXTS, language=st.sampled_from(LANGUAGES), choice=st.sampled_from(CHOICES))
@example(text="don\u2019t", language="en", choice="auto")
@example(text="5% of 3.1 million, 1,000 people", language="en", choice="auto")
def test_the_label_of_a_text_has_no_errors_against_it_in_any_language(text: str, language: str, choice: Choice) -> None:
    assert_no_errors(text, language, choice)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(text=TEXTS)
def test_the_label_of_a_text_has_no_errors_against_it_in_english(text: str) -> None:
    assert_no_errors(text, "en")


@pytest.mark.parametrize("language", ["en", "tr", "uk", ""])
def test_no_character_makes_a_label_differ_from_its_text(language: str) -> None:
    """Every assigned character except ideographs, between letters, at the edge of a word and alone."""
    clean = normaliser(language).clean
    characters = [
        chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) not in ("Cn", "Co")
    ]
    ideographs = ("CJK UNIFIED", "HANGUL SYLL", "TANGUT")
    others = [character for character in characters if not unicodedata.name(character, "").startswith(ideographs)]
    for start in range(0, len(others), 50):
        text = " ".join(f"a{character}b {character}I {character}" for character in others[start : start + 50])
        label = label_text(text, language)
        assert label_text(label, language) == label, hex(ord(others[start]))
        assert clean(label) == clean(text), hex(ord(others[start]))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(words=st.lists(TEXTS, max_size=8), language=st.sampled_from(["en", "tr", "zh", ""]))
def test_the_labels_of_words_join_to_the_label_of_the_text(words: list[str], language: str) -> None:
    labels = label_words(words, language)
    assert len(labels) == len(words)
    text = " ".join(words)
    assert " ".join(" ".join(labels).split()) == label_text(text, language)


def test_a_timed_hypothesis_equal_to_the_label_has_no_errors() -> None:
    text = "don\u2019t [background noise] pay $3.1 million (or 5%) to Co\u00adop"
    hypothesis = [TimedWord(word, i, i + 0.9) for i, word in enumerate(label_text(text, "en").split())]
    assert {word.kind for word in align_timed(text, hypothesis, "en")} == {"hit"}
    segments = [ReferenceSegment(0, 60, text)]
    assert score_as_whole("x", segments, hypothesis, "en").words.errors == 0
    assert score_by_segments("x", segments, hypothesis, "en").characters.errors == 0


def test_labels_of_segments_have_no_errors_against_all_segments_together() -> None:
    texts = ["she said (well", "that is $3", "million) all"]
    segments = [ReferenceSegment(10 * i, 10 * i + 9, text) for i, text in enumerate(texts)]
    labels = [label_text(text, "en").split() for text in texts]
    hypothesis = [
        TimedWord(word, 10 * i + k, 10 * i + k + 0.9) for i, words in enumerate(labels) for k, word in enumerate(words)
    ]
    assert score_as_whole("x", segments, hypothesis, "en").words.errors == 0
    assert score_by_segments("x", segments, hypothesis, "en").words.errors == 0


@pytest.mark.parametrize("apostrophe", [*APOSTROPHES, "\u02bb", "\ua78c", "\u055a"])
@pytest.mark.parametrize("language", ["en", "uk", "fr", ""])
def test_all_apostrophes_are_equal_in_labels_and_scores(apostrophe: str, language: str) -> None:
    text, plain = f"don{apostrophe}t {apostrophe}quoted{apostrophe} l{apostrophe}eau", "don't 'quoted' l'eau"
    assert label_text(text, language) == label_text(plain, language) == "don't quoted l'eau"
    assert normaliser(language).clean(text) == normaliser(language).clean(plain)


def test_the_okina_is_a_letter_in_its_languages_only() -> None:
    assert label_text("\u02bbO Hawai\u02bbi", "haw") == "\u02bbo hawai\u02bbi"
    assert label_text("o\u02bbzbek", "uz") == label_text("o\u2018zbek", "uz") == "o'zbek"


@pytest.mark.parametrize("language", ["fa", "hi", "ml", "he", "de", "en", "km"])
def test_invisible_characters_change_neither_label_nor_score(language: str) -> None:
    plain = "\u0645\u06cc\u062e\u0648\u0627\u0647\u0645 \u0915\u0937 \u05e9\u05dc\u05d5\u05dd Kooperation"
    generator = random.Random(0)
    hidden = "\ufeff" + "".join(character + generator.choice(["", *INVISIBLE]) for character in plain)
    assert label_text(hidden, language) == label_text(plain, language)
    assert normaliser(language).clean(hidden) == normaliser(language).clean(plain)


def test_both_spellings_of_a_malayalam_chillu_are_equal_and_a_zero_width_space_separates_words() -> None:
    assert label_text("\u0d05\u0d35\u0d28\u0d4d\u200d", "ml") == label_text("\u0d05\u0d35\u0d7b", "ml")
    assert label_text("\u1781\u17d2\u1798\u200b\u178f", "km") == "\u1781\u17d2\u1798 \u178f"


def test_brackets_remove_annotations_and_never_a_sentence() -> None:
    for text in ("[laughter]", "<unk>", "(inaudible)", "{SMACK}", "[background noise]", "((noise))", "( Laughs. )",
                 "</i>", "<crosstalk start>", "[inaudible 00:12:34]", "\uff08\u7b11\uff09"):  # fmt: skip
        for language in ("en", "nl", "zh"):
            assert (
                label_text(f"yes {text} no", language)
                == "yes no"
                == " ".join(normaliser("nl").clean(f"yes {text} no").split())
            )
    kept = {
        "if x < y and all that is in here then a > b": "if x y and all that is in here then a b",
        "a <b and c> d<e and f>g": "a d e and f g",
        "(one two three four five six)": "one two three four five six",
        "he said (well. That is) all": "he said well that is all",
        "x <y [noise] z> w": "x y z w",
        "a ( b": "a b",
    }
    for text, label in kept.items():
        assert label_text(text) == label, text
    for language in ("zh", ""):
        assert label_text(f"[{chr(0x6211) * 21}]", language) == chr(0x6211) * 21
        assert label_text(f"[{chr(0x6211) * 5}]", language) == ""


def test_all_codes_and_names_of_a_language_give_the_same_code() -> None:
    forms = {code: [form for form, target in _CODES.items() if target == code] for code in _NAMES}
    assert len(forms) > 180 and all(len(names) > 1 for names in forms.values())
    assert all(code.isascii() and not code.isupper() for code in _CODES)
    text = "I\u0130 \u043f'\u044f\u0442\u044c \u00df 5% \u0623\u064e \u6211\u4eec"
    for code, names in forms.items():
        for form in names:
            for spelling in (form, form.upper(), form.title(), f"{form}-XX", f"{form}_XX.UTF-8", f" {form} "):
                assert language_code(spelling) == code, spelling
            assert label_text(text, form) == label_text(text, code)
            assert normaliser(form).name == normaliser(code).name
    for turkic in ("tr", "tur", "Turkish", "TUR", "tr-TR", "tr_TR", "aze", "azj", "Azerbaijani", "az-Latn"):
        assert label_text("DI\u015e I\u0130", turkic) == "d\u0131\u015f \u0131i", turkic
    for other in ("azz", "trv", "en", "", "tra"):
        assert label_text("DI", other) == "di", other
    assert language_code("azz") == "azz" and language_name("ger") == "German" and language_name("azz") == "azz"
    assert RULES.keys() <= _NAMES.keys() and is_unspaced("Thai") and is_unspaced("zh-TW") and not is_unspaced("ko")


def test_a_report_names_languages_and_keeps_regions_apart() -> None:
    languages = ["tr", "tur", "Turkish", "pt-BR", "pt", "azz", "all", ""]
    assert [language_text(language) for language in languages] == [
        "Turkish", "Turkish (tur)", "Turkish", "Portuguese (pt-BR)", "Portuguese", "azz", "All recordings", "not given",
    ]  # fmt: skip


def test_ukrainian_spellings_with_any_apostrophe_have_the_same_label() -> None:
    spellings = [f"\u043f{apostrophe}\u044f\u0442\u044c" for apostrophe in APOSTROPHES]
    assert {label_text(spelling, "ukr") for spelling in spellings} == {"\u043f'\u044f\u0442\u044c"}
    assert {normaliser("Ukrainian").clean(spelling) for spelling in spellings} == {"\u043f\u02bc\u044f\u0442\u044c"}


WHISPER = EnglishTextNormalizer()


@pytest.mark.parametrize("text", [
    "It's 5% of 3.1 million, or 1,000 people at $20.",
    "$3.1 million and \u00a31,234.56 - $0.35 a share, \u20ac5 billion",
    "Mr. Smith's colour TV cost $1.50, didn't it? Um, I'd been there.",
    "the 1st of 1960s; 10-20% or 2.0, 0.5% and 10.0",
    "plus 9.3% at minus 4.4% in 2020 0.5%", "Q1 2021: 45 to 50, 192.168.1.1 [laughter] (inaudible) <unk>",
    "twenty one percent, five dollars and seven cents, three point one million, zero point five", "he 's got it 's",
    "five $20 bills, 5 20% and one hundred and five", "$2 million", "$1", "1 dollar",
    "10,000,000 \u00a250", ".5 or 1.5x",
])  # fmt: skip
def test_english_is_scored_as_by_whispers_normaliser_alone(text: str) -> None:
    assert normaliser("en").clean(text) == " ".join(WHISPER(text).split())


@pytest.mark.parametrize(("reference", "hypothesis"), [
    ("5%", "five percent"), ("5%", "5 percent"), ("5 %", "5%"), ("$20", "twenty dollars"), ("$20", "20 dollars"),
    ("3.1 million", "three point one million"), ("$3.1 million", "three point one million dollars"), ("2.0", "2"),
    ("1,000 people", "one thousand people"), ("0.5%", "zero point five percent"), ("1st", "first"),
    ("$0.35", "35 cents"),
    ("don\u2019t", "do not"), ("it\u2019s", "it is"), ("colour", "color"),
    ("\u00a35.50", "five point five zero pounds"),
    ("one dollar", "$1"), ("20 \u20ac", "twenty euros"), ("5\uff05", "five percent"),
])  # fmt: skip
def test_equivalent_english_words_and_symbols_match(reference: str, hypothesis: str) -> None:
    assert score_recording("x", reference, hypothesis, "en").words.errors == 0
    assert score_recording("x", hypothesis, reference, "en").words.errors == 0


@pytest.mark.parametrize(
    "text", ["1" * 5000, "1" * 5000 + ".5%", "$" + "9" * 9000, "\u00b2" * 5000, "1,000" + ",000" * 2000]
)
def test_a_number_of_thousands_of_digits_is_scored_like_any_other_word(text: str) -> None:
    assert_no_errors(text, "en")
    assert score_recording("x", text, "two", "en").words.errors > 0


def test_different_english_numbers_are_errors() -> None:
    for reference, hypothesis in [
        ("5%", "5"),
        ("$20", "20"),
        ("$20", "\u20ac20"),
        ("3.1", "31"),
        ("1,000", "1 000"),
        ("5%", "6%"),
    ]:
        assert score_recording("x", reference, hypothesis, "en").words.errors > 0, (reference, hypothesis)


@pytest.mark.parametrize(("text", "label"), [
    ("5% of 3.1 million", "5 percent of 3 point 1 million"), ("$3.1 million.", "3 point 1 million dollars"),
    ("$1, $1 million", "1 dollar 1 million dollars"), ("1,000 or 1,00,000", "1000 or 100000"),
    ("in 2010,2011 1,2,3", "in 2010 2011 1 2 3"), ("US$20-30", "us 20 dollars 30"), ("$.50", "point 50 dollars"),
    ("no.5 ...5 $ % .", "no 5 5"), ("4-5 %", "4 5 percent"), ("20\u20ac \u20ac20", "20 euros 20 euros"),
])  # fmt: skip
def test_english_labels_write_numbers_in_letters_and_digits_only(text: str, label: str) -> None:
    assert label_text(text, "en") == label and label_text(label, "en") == label
    assert label_text(text, "nl") == " ".join(re.sub(r"[\W_]", " ", text.lower()).split())


def test_symbols_are_restored_from_labels() -> None:
    for text in ("$3.1 million", "5%", "\u20ac5", "\u00a31.50", "192.168.1.1", "at this point 3", "five percent"):
        assert with_symbols(label_text(text, "en")) == text


def test_folding_gives_nfc_and_is_idempotent() -> None:
    for text in PIECES:
        assert fold(fold(text)) == fold(text) and unicodedata.is_normalized("NFC", fold(text))
