"""Results as text: numbers, sentences, and tables for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from bestrq.report.comparison import setting_of
from common.languages import language_code, language_name

FEW_RECORDINGS = 5
"""below this effective number of recordings, `few_recordings_warning` warns"""
DASH = "\N{EN DASH}"
_GROUPS = {"all": "All recordings", "": "not given"}


def percent(rate: float | None) -> str:
    """`0.1234` as `12.3 %`; a dash for None."""
    return DASH if rate is None else f"{rate_text(rate)} %"


def rate_text(rate: float | None) -> str:
    """`0.1234` as `12.3`; a dash for None."""
    return DASH if rate is None else f"{100 * rate:.1f}"


def points(difference: float | None) -> str:
    """`-0.0123` as `-1.2`, a difference in percentage points; a dash for None."""
    return DASH if difference is None else f"{100 * difference:+.1f}"


def interval(bounds: Sequence[float] | None, signed: bool = False) -> str:
    """`(0.1, 0.2)` as `10.0 to 20.0`, in percent; empty for None."""
    sign = "+" if signed else ""
    return "" if bounds is None else f"{100 * bounds[0]:{sign}.1f} to {100 * bounds[1]:{sign}.1f}"


def number(value: float | None, digits: int = 1) -> str:
    """Number with thousands separators and the given number of decimals; a dash for None."""
    return DASH if value is None else f"{value:,.{digits}f}"


def p_text(p_value: float) -> str:
    """p value with three decimals, or `< 0.001`."""
    return f"{p_value:.3f}" if p_value >= 0.001 else "< 0.001"


def language_text(language: str) -> str:
    """English name of a dataset's language, followed by the dataset's code if that adds to it: "Portuguese (pt-BR)"."""
    name = _GROUPS.get(language) or language_name(language)
    return name if language in (*_GROUPS, name, language_code(language)) else f"{name} ({language})"


def difference_sentence(comparison: Mapping[str, Any], rate: Literal["wer", "cer"] = "wer") -> str:
    """Sentence on the difference of an entry of `compare_systems` in WER or CER, and whether it is significant."""
    name, compared = rate.upper(), comparison[rate]
    start = f"{name} of {comparison['system']} minus {name} of {comparison['baseline']}"
    if compared is None:
        return f"{start}: no reference words."
    text, bounds = f"{start}: {points(compared['difference'])} points", compared["interval"]
    if bounds is None:
        return f"{text}; too few recordings for an interval."
    # If one recording has most of the words, the studentised and the plain bootstrap may disagree: both must be clear.
    significant = (bounds[0] > 0 or bounds[1] < 0) and not 0.025 <= compared["probability_first_better"] <= 0.975
    verdict = "" if significant else ", not significant"
    reduction = compared.get("reduction_interval")
    relative = f"; relative reduction {percent(compared['reduction'])} ({interval(reduction)})" if reduction else ""
    return f"{text} (95 % interval {interval(bounds, signed=True)}{verdict}){relative}."


def few_recordings_warning(results: Mapping[str, Any]) -> str:
    """Warning that intervals are unreliable, if few recordings hold most of the words; empty otherwise.

    Effective number of recordings: (sum of words)^2 / sum of squares (Kish 1965, section 11.7).
    """
    words = [row["word_hits"] + row["word_substitutions"] + row["word_deletions"] for row in results["recordings"]]
    total, squares = sum(words), sum(count * count for count in words)
    if not total or total * total >= FEW_RECORDINGS * squares:
        return ""
    return (
        f"One recording has {max(words) / total:.0%} of the words. The effective number of recordings is only "
        f"{total * total / squares:.1f} of {len(words)}, so intervals are unreliable."
    )


def rates_table(results: Mapping[str, Any]) -> str:
    """Terminal table of an evaluation: WER and CER by language with 95 % intervals, and by segments if available."""
    lines = [f"{'language':<12}{'recordings':>11}{'minutes':>9}{'WER':>9}{'95 %':>16}{'CER':>9}{'95 %':>16}"]
    segments = {"by segments": results["segments"]["all"]} if results["segments"] else {}
    for language, score in (results["scores"] | segments).items():
        rates = "".join(
            f"{percent(score[rate]):>9}{interval(score[f'{rate}_interval']):>16}" for rate in ("wer", "cer")
        )
        lines.append(f"{language or '-':<12}{score['num_recordings']:>11,}{score['seconds'] / 60:>9.1f}{rates}")
    return "\n".join(lines)


def comparison_table(numbers: Mapping[str, Any]) -> str:
    """Terminal table of several evaluations: rates, difference from the first in WER, cost; below it, the paired
    differences and relative reductions of WER and CER.

    Args:
        numbers: content of report.json.
    """
    systems = numbers["systems"]
    comparisons = {entry["system"]: entry for entry in numbers["comparisons"]}
    width = max(6, *(len(system["system"]) for system in systems))
    named_by_setting = all(setting_of(system) in system["system"] for system in systems)  # the names of a sweep
    lines = [
        f"{'system':<{width}}{'WER':>9}{'95 %':>16}{'CER':>9}{'vs. first':>14}{'95 %':>16}{'p':>9}"
        f"{'RTF':>9}{'peak MB':>9}{'' if named_by_setting else '  setting'}"
    ]
    for system in systems:
        total, cost = system["scores"]["all"], system["decoding"]
        comparison = comparisons.get(system["system"])
        wer = (comparison["wer"] if comparison else None) or {}
        rates = f"{percent(total['wer']):>9}{interval(total['wer_interval']):>16}{percent(total['cer']):>9}"
        difference = f"{points(wer['difference']) if wer else '':>14}{interval(wer.get('interval'), signed=True):>16}"
        difference += f"{p_text(comparison['matched_pairs']['p_value']) if comparison else '':>9}"
        factor, megabytes = cost["real_time_factor"], cost["peak_mb"]
        speed = f"{'-' if factor is None else f'{factor:.4f}':>9}{'-' if megabytes is None else f'{megabytes:,.0f}':>9}"
        setting = "" if named_by_setting else f"  {setting_of(system)}"
        lines.append(f"{system['system']:<{width}}{rates}{difference}{speed}{setting}")
    if comparisons:
        heading = f"minus {next(iter(comparisons.values()))['baseline']}"
        width = max(width, len(heading))
        columns = "".join(
            f"{f'{rate}, points':>13}{'95 %':>16}{'reduction':>11}{'95 %':>16}" for rate in ("WER", "CER")
        )
        lines += ["", f"{heading:<{width}}{columns}"]
        lines += [
            f"{name:<{width}}{_paired(entry, 'wer')}{_paired(entry, 'cer')}" for name, entry in comparisons.items()
        ]
    return "\n".join(lines)


def _paired(comparison: Mapping[str, Any], rate: str) -> str:
    """Difference and relative reduction of a rate with their 95 % intervals, as columns of a table."""
    compared = comparison[rate] or {}
    difference, reduction = compared.get("difference"), compared.get("reduction")
    return (
        f"{points(difference):>13}{interval(compared.get('interval'), signed=True):>16}"
        f"{percent(reduction):>11}{interval(compared.get('reduction_interval')):>16}"
    )
