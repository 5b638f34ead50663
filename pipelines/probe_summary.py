"""Summary of a probe ladder: rates with intervals by layer, comparison of the best layers, table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bestrq.pretraining.probing import best_layer
from bestrq.scoring.significance import bootstrap_interval
from pipelines.probe_layers import Material
from pipelines.probing import WEIGHTED, Source, rate

PROBES = {
    "nats": "nats per character",
    "cer": "CER",
    "phone": "phone error",
    "speaker": "speaker error",
    "language": "language error",
    "abx_within": "ABX error within speakers",
    "abx_across": "ABX error across speakers",
}
"""title of every probe; lower is better in all of them"""
FIGURES = ("frame_correlation", "effective_rank", "effective_rank_entropy")
Results = Mapping[str, Mapping[str, Any]]
"""results of a source by layer"""


@dataclass(frozen=True)
class Ladder:
    """Results of a source."""

    source: Source
    layers: Results


def summarise(ladders: Sequence[Ladder], material: Material) -> dict[str, Any]:
    """JSON object of a whole ladder: every source by layer, and comparisons for every export and probe."""
    return {
        "chance": chance_levels(ladders, material),
        "skipped": material.skipped,
        "recordings": {
            "train": len(material.ctc.train.recordings),
            "evaluation": len(material.ctc.evaluation.recordings),
            **{data.name: [len(data.train), len(data.evaluation)] for data in material.classes},
        },
        "classes": {data.name: data.classes for data in material.classes},
        "sources": [
            {"name": ladder.source.name, "kind": ladder.source.kind, "layers": summarise_layers(ladder.layers)}
            for ladder in ladders
        ],
        "comparisons": [
            comparison
            for ladder in ladders
            if ladder.source.kind == "export"
            for comparison in compare_export(ladder, ladders)
        ],
    }


def summarise_layers(layers: Results) -> dict[str, dict[str, Any]]:
    """Rate and 95 % interval of every probe, and figures without labels, by layer."""
    summary: dict[str, dict[str, Any]] = {}
    for layer, result in layers.items():
        summary[layer] = {name: _finite(result[name]) for name in FIGURES if name in result}
        for name in PROBES:
            if name in result:
                ends = bootstrap_interval(np.array(result[name]["errors"]), np.array(result[name]["sizes"]))
                summary[layer][name] = {"rate": _finite(rate(result[name])), "interval": ends}
        summary[layer]["train_nats"] = result["train_nats"]
        if layer == WEIGHTED:
            summary[layer]["layer_weights"] = result["layer_weights"]
    return summary


def compare_export(ladder: Ladder, ladders: Sequence[Ladder]) -> list[dict[str, Any]]:
    """Best layer of an export against log-mel and the best layer of the random encoder, for every probe.

    The best layers are chosen by cross-fitting (`best_layer`), and the interval is that of the paired difference of
    errors over the same recordings. `better` states that it lies below 0.
    """
    source, comparisons = ladder.source, []
    for other in ladders:
        same = other.source.settings == source.settings
        if other.source.kind == "log-mel":
            same = other.source.settings.stride == source.settings.stride
        if other.source.kind == "export" or not same or other.source.normalisation != source.normalisation:
            continue
        names = {"export": source.name, "baseline": other.source.kind}
        for name in PROBES:
            if all(name in layers["0"] for layers in (ladder.layers, other.layers)):
                comparisons.append({**names, **_compare(ladder.layers, other.layers, name)})
    return comparisons


def _compare(layers: Results, others: Results, name: str) -> dict[str, Any]:
    best, other = (best_layer(_values(results, name)) for results in (layers, others))
    sizes = np.array(layers["0"][name]["sizes"], dtype=np.float64)
    difference = best.values - other.values
    interval = bootstrap_interval(difference, sizes) if np.isfinite(difference).all() else None
    return {
        "probe": name,
        "best_layer": best.layer,
        "difference": _finite(float(difference.sum() / sizes.sum())),
        "interval": interval,
        "better": interval is not None and interval[1] < 0,
    }


def _values(layers: Results, name: str) -> np.ndarray:
    """Errors of every layer and recording, float64 `[L, N]`, without the weighted sum."""
    return np.array([result[name]["errors"] for layer, result in layers.items() if layer != WEIGHTED])


def chance_levels(ladders: Sequence[Ladder], material: Material) -> dict[str, float]:
    """Error of always giving the most frequent answer of the training, by probe."""
    levels = dict.fromkeys(material.abx, 0.5)
    for data in material.classes:
        classes = np.array([number for _, number in data.train])
        evaluation = np.array([number for _, number in data.evaluation])
        levels[data.name] = float(np.mean(evaluation != np.bincount(classes).argmax()))
    for ladder in ladders:
        if "phone" in ladder.layers["0"]:
            levels["phone"] = 1 - ladder.layers["0"]["phone"]["chance"]
    return levels


def table(summary: Mapping[str, Any]) -> str:
    """Results by layer as text, errors in percent, then the comparisons."""
    names = [name for name in PROBES if any(name in s["layers"]["0"] for s in summary["sources"])]
    heads = ["layer", *(_HEADS[name] for name in names), "corr.", "rank"]
    lines = []
    for source in summary["sources"]:
        rows = [heads]
        for layer, values in source["layers"].items():
            figures = [_number(values.get("frame_correlation"), ".2f"), _number(values.get("effective_rank"), ".1f")]
            rows.append([layer, *(_cell(values.get(name), name) for name in names), *figures])
        widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
        lines += [
            source["name"],
            *("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows),
            "",
        ]
    if summary["chance"]:
        levels = (f"{PROBES[name]} {100 * level:.1f} %" for name, level in summary["chance"].items())
        lines.append(f"chance: {', '.join(levels)}")
    lines += [f"not measured: {PROBES.get(name, name)}: {reason}" for name, reason in summary["skipped"].items()]
    for c in summary["comparisons"]:
        scale, unit = (1, "") if c["probe"] == "nats" else (100, " %")
        ends = "" if c["interval"] is None else " ({:+.3g} to {:+.3g})".format(*(scale * end for end in c["interval"]))
        verdict = "better" if c["better"] else "not better"
        lines.append(
            f"{c['export']}, layer {c['best_layer']} against {c['baseline']}: {PROBES[c['probe']]} "
            f"{_number(c['difference'], '+.3g', scale)}{unit}{ends}: {verdict}"
        )
    return "\n".join(lines)


_HEADS = {
    "nats": "nats/char", "cer": "CER %", "phone": "phone %", "speaker": "speaker %", "language": "language %",
    "abx_within": "ABX w. %", "abx_across": "ABX a. %",
}  # fmt: skip


def _cell(value: Mapping[str, Any] | None, name: str) -> str:
    if value is None:
        return "-"
    scale, form = (1, ".3f") if name == "nats" else (100, ".1f")
    text = _number(value["rate"], form, scale)
    if value["interval"] is None:
        return text
    low, high = (format(scale * end, form) for end in value["interval"])
    return f"{text} ({low}-{high})"


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "-" if value is None else format(scale * value, form)


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
