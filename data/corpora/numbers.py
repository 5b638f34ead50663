"""Numbers from 0 to 999 in words, in the languages of the synthetic corpus."""

from __future__ import annotations

from collections.abc import Callable

_EN = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_EN_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()

_DE = (
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf".split()
    + ("dreizehn vierzehn fünfzehn sechzehn siebzehn achtzehn neunzehn").split()
)
_DE_TENS = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()

_NL = (
    "nul een twee drie vier vijf zes zeven acht negen tien elf twaalf".split()
    + ("dertien veertien vijftien zestien zeventien achttien negentien").split()
)
_NL_TENS = "twintig dertig veertig vijftig zestig zeventig tachtig negentig".split()

_FR = "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize".split() + [
    "dix sept", "dix huit", "dix neuf",
]  # fmt: skip
_FR_TENS = "vingt trente quarante cinquante soixante".split()

_ES = (
    "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis diecisiete "
    "dieciocho diecinueve veinte veintiuno veintidós veintitrés veinticuatro veinticinco veintiséis veintisiete "
    "veintiocho veintinueve"
).split()
_ES_TENS = "treinta cuarenta cincuenta sesenta setenta ochenta noventa".split()
_ES_HUNDREDS = (
    "ciento doscientos trescientos cuatrocientos quinientos seiscientos setecientos ochocientos novecientos"
).split()

_IT = (
    "zero uno due tre quattro cinque sei sette otto nove dieci undici dodici tredici quattordici quindici sedici "
    "diciassette diciotto diciannove"
).split()
_IT_TENS = "venti trenta quaranta cinquanta sessanta settanta ottanta novanta".split()

_CS = (
    "nula jedna dva tři čtyři pět šest sedm osm devět deset jedenáct dvanáct třináct čtrnáct patnáct šestnáct "
    "sedmnáct osmnáct devatenáct"
).split()
_CS_TENS = "dvacet třicet čtyřicet padesát šedesát sedmdesát osmdesát devadesát".split()
_CS_HUNDREDS = ["sto", "dvě stě", "tři sta", "čtyři sta", "pět set", "šest set", "sedm set", "osm set", "devět set"]


def _english(n: int) -> str:
    if n >= 100:
        return f"{_EN[n // 100]} hundred" + (f" {_english(n % 100)}" if n % 100 else "")
    if n < 20:
        return _EN[n]
    return _EN_TENS[n // 10 - 2] + (f" {_EN[n % 10]}" if n % 10 else "")


def _german(n: int) -> str:
    if n >= 100:
        return f"{_joined_one(n // 100)}hundert" + (_german(n % 100) if n % 100 else "")
    if n < 20:
        return _DE[n]
    return (f"{_joined_one(n % 10)}und" if n % 10 else "") + _DE_TENS[n // 10 - 2]


def _joined_one(digit: int) -> str:
    return "ein" if digit == 1 else _DE[digit]


def _dutch(n: int) -> str:
    if n >= 100:
        return ("" if n < 200 else _NL[n // 100]) + "honderd" + (_dutch(n % 100) if n % 100 else "")
    if n < 20:
        return _NL[n]
    # After a final e the Dutch "and" is written with a diaeresis.
    joint = "ën" if n % 10 in (2, 3) else "en"
    return (f"{_NL[n % 10]}{joint}" if n % 10 else "") + _NL_TENS[n // 10 - 2]


def _french(n: int) -> str:
    if n >= 100:
        hundreds = "cent" if n < 200 else f"{_FR[n // 100]} cent" + ("" if n % 100 else "s")
        return hundreds + (f" {_french(n % 100)}" if n % 100 else "")
    if n < 20:
        return _FR[n]
    if n >= 80:
        return "quatre vingt" + (f" {_FR[n - 80]}" if n > 80 else "s")
    tens = min(n // 10, 6)  # seventy is sixty and ten
    rest = n - 10 * tens
    if not rest:
        return _FR_TENS[tens - 2]
    return f"{_FR_TENS[tens - 2]} {'et ' if rest in (1, 11) else ''}{_FR[rest]}"


def _spanish(n: int) -> str:
    if n == 100:
        return "cien"
    if n > 100:
        return _ES_HUNDREDS[n // 100 - 1] + (f" {_spanish(n % 100)}" if n % 100 else "")
    if n < 30:
        return _ES[n]
    return _ES_TENS[n // 10 - 3] + (f" y {_ES[n % 10]}" if n % 10 else "")


def _italian(n: int) -> str:
    if n >= 100:
        return ("" if n < 200 else _IT[n // 100]) + "cento" + (_italian(n % 100) if n % 100 else "")
    if n < 20:
        return _IT[n]
    tens, unit = _IT_TENS[n // 10 - 2], n % 10
    if unit in (1, 8):  # the vowels elide
        tens = tens[:-1]
    return tens + ({0: "", 3: "tré"}.get(unit, _IT[unit]))


def _czech(n: int) -> str:
    if n >= 100:
        return _CS_HUNDREDS[n // 100 - 1] + (f" {_czech(n % 100)}" if n % 100 else "")
    if n < 20:
        return _CS[n]
    return _CS_TENS[n // 10 - 2] + (f" {_CS[n % 10]}" if n % 10 else "")


_SPELL: dict[str, Callable[[int], str]] = {
    "en": _english, "de": _german, "nl": _dutch, "fr": _french, "es": _spanish, "it": _italian, "cs": _czech,
}  # fmt: skip


def spell_number(n: int, language: str) -> str:
    """Spell `n` (0 to 999) in a language (ISO 639-1 code); words are separated by spaces."""
    if not 0 <= n <= 999:
        raise ValueError(f"n={n}: must be from 0 to 999")
    return _SPELL[language](n)
