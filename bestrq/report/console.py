"""Results as text for a terminal."""

from collections.abc import Mapping
from typing import Any

from bestrq.report.comparison import p_text, setting_of
from bestrq.report.tables import interval, percent, points


def rates_table(results: Mapping[str, Any]) -> str:
    """Rates of an evaluation by language, with 95 % intervals; by segments, too, where there are any."""
    lines = [f"{'language':<12}{'recordings':>11}{'minutes':>9}{'WER':>9}{'95 %':>16}{'CER':>9}{'95 %':>16}"]
    segments = {"by segments": results["segments"]["all"]} if results["segments"] else {}
    for language, one in (results["scores"] | segments).items():
        rates = "".join(f"{percent(one[rate]):>9}{interval(one[f'{rate}_interval']):>16}" for rate in ("wer", "cer"))
        lines.append(f"{language or '-':<12}{one['num_recordings']:>11,}{one['seconds'] / 60:>9.1f}{rates}")
    return "\n".join(lines)


def comparison_table(numbers: Mapping[str, Any]) -> str:
    """A line an evaluation, of what `pages.write_comparison` gives: rates, difference to the first, cost."""
    systems = numbers["systems"]
    compared = {one["system"]: one for one in numbers["comparisons"]}
    width = max(6, *(len(one["system"]) for one in systems))
    named = all(setting_of(one) in one["system"] for one in systems)  # those of a grid
    lines = [
        f"{'system':<{width}}{'WER':>9}{'95 %':>16}{'CER':>9}{'to the first':>14}{'95 %':>16}{'p':>9}"
        f"{'RTF':>9}{'peak MB':>9}{'' if named else '  setting'}"
    ]
    for one in systems:
        total, cost = one["scores"]["all"], one["decoding"]
        other = compared.get(one["system"])
        wer = (other["wer"] if other else None) or {}
        rates = f"{percent(total['wer']):>9}{interval(total['wer_interval']):>16}{percent(total['cer']):>9}"
        difference = f"{points(wer['difference']) if wer else '':>14}{interval(wer.get('interval'), signed=True):>16}"
        difference += f"{p_text(other['matched_pairs']['p_value']) if other else '':>9}"
        factor, megabytes = cost["real_time_factor"], cost["peak_mb"]
        speed = f"{'-' if factor is None else f'{factor:.4f}':>9}{'-' if megabytes is None else f'{megabytes:,.0f}':>9}"
        setting = "" if named else f"  {setting_of(one)}"
        lines.append(f"{one['system']:<{width}}{rates}{difference}{speed}{setting}")
    return "\n".join(lines)
