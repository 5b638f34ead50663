"""Paired comparisons and curves of WER over context, from several evaluations.

Evaluations are parsed `results.json` files, keyed by their name in the report.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bestrq.report.result_files import SCORING
from bestrq.scoring.word_errors import ErrorCounts, RecordingScore, compare
from common.errors import UserError

Results = Mapping[str, Mapping[str, Any]]
"""results.json by system"""

KINDS = ("hits", "substitutions", "deletions", "insertions")
WINDOWED_MODES = ("buffered", "averaged", "stitched")
# Encoder settings that define the context of a mode. Only differences in other settings separate curves of that mode.
_CONTEXT_SETTINGS = {"windowed": ("mask", "window"), "whole": ("mask", "window"), "streaming": ("mask", "left_chunks")}
_SUMMARY_KEYS = (
    "label", "name", "export", "export_hash", "dataset", "command", "versions", "device", "context_seconds",
    "inference", "encoder", "decoder", "decoding", "scores", "segments", "positions", "edge_distances", "speakers",
    "durations", "confusions", "normalisers",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """Point of a curve of error rate over context."""

    context_seconds: float
    """context of an encoder frame; 0 for the whole recording"""
    rate: float
    interval: tuple[float, float] | None
    """95 %"""
    system: str = ""
    """name of the evaluation"""

    def summary(self) -> dict[str, Any]:
        """JSON-able dict."""
        return asdict(self)


def recording_score(row: Mapping[str, Any]) -> RecordingScore:
    """Inverse of `RecordingScore.row`."""
    return RecordingScore(
        id=row["id"],
        language=row["language"],
        seconds=row["seconds"],
        reference=row["reference"],
        hypothesis=row["hypothesis"],
        words=ErrorCounts(*(row[f"word_{kind}"] for kind in KINDS)),
        characters=ErrorCounts(*(row[f"char_{kind}"] for kind in KINDS)),
        speaker=row["speaker"],
        normaliser=row["normaliser"],
    )


def compare_systems(systems: Results, num_resamples: int = 10_000) -> list[dict[str, Any]]:
    """Paired comparison of each system with the first, on the same recordings.

    Returns:
        `Comparison.summary()` of each, with the names under "system" and "baseline". Differences are the system's rate
        minus the baseline's: negative if the system is better.

    Raises:
        UserError: recordings, references or scoring rules differ.
    """
    (baseline, results), *others = systems.items()
    baseline_scores = [recording_score(row) for row in results["recordings"]]
    check_same_rules(systems)
    comparisons = []
    for name, other in others:
        try:
            compared = compare([recording_score(row) for row in other["recordings"]], baseline_scores, num_resamples)
        except UserError as error:
            raise UserError(f"{name} and {baseline} cannot be compared: {error}") from error
        comparisons.append({"system": name, "baseline": baseline, **compared.summary()})
    return comparisons


def check_same_rules(systems: Results) -> None:
    """Raise UserError unless all systems were scored with the same version of the scoring rules."""
    versions = {name: results.get("versions", {}).get(SCORING, "1") for name, results in systems.items()}
    newest = max(versions.values(), key=int, default="")
    for name, version in versions.items():
        if version != newest:
            raise UserError(
                f"{name} was scored with version {version} of the scoring rules, others with {newest}: evaluate {name} "
                "again"
            )


def check_same_references(systems: Results) -> None:
    """Raise UserError unless all systems were scored on the same recordings, references and scoring rules."""
    check_same_rules(systems)
    (first, results), *others = systems.items()
    expected = {row["id"]: row["reference"] for row in results["recordings"]}
    for name, other in others:
        references = {row["id"]: row["reference"] for row in other["recordings"]}
        if references.keys() != expected.keys():
            raise UserError(f"{first} and {name} were evaluated on different recordings: evaluate both on the same")
        if different := [id for id in expected if expected[id] != references[id]]:
            raise UserError(
                f"recording {different[0]!r} has different references in {first} and {name} ({len(different)} such "
                "recordings): score both on the same data, with the same normaliser"
            )


def context_curves(systems: Results) -> dict[str, list[Point]]:
    """Curves of WER over context, by name: points that share system, mode, overlap and decoder.

    A curve is named by the settings that distinguish it from the others. The whole-recording evaluation of a system and
    decoder, which has no mode and no overlap, is the last point of each of their curves. A curve may have a single
    point. Streaming evaluations of unknown context are left out.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Point]] = {}
    for name, results in systems.items():
        total = results["scores"]["all"]
        has_context = results["context_seconds"] > 0 or mode_of(results) == "whole"
        if has_context and total["wer"] is not None:
            point = Point(float(results["context_seconds"]), total["wer"], total["wer_interval"], name)
            groups.setdefault(tuple(_traits(results).items()), []).append(point)
    curves = {key: points for key, points in groups.items() if dict(key)["mode"] != "whole"}
    for key, points in groups.items():
        if dict(key)["mode"] == "whole":
            extended = [curve for curve in curves if _same_system(dict(curve), dict(key))]
            if not extended:
                curves[key] = []
            for curve in extended or [key]:
                curves[curve] = curves[curve] + points
    names = _curve_names([dict(key) for key in curves], systems)
    return {
        name: sorted(points, key=lambda point: (point.context_seconds == 0, point.context_seconds))
        for name, points in zip(names, curves.values(), strict=True)
    }


def has_several_contexts(curves: Mapping[str, Sequence[Point]]) -> bool:
    """Return whether the points have at least two contexts, so that a chart is useful."""
    return len({point.context_seconds for points in curves.values() for point in points}) > 1


def describe_systems(systems: Results) -> list[dict[str, Any]]:
    """All numbers of the evaluations except those of single recordings."""
    return [{"system": name, **{key: results.get(key) for key in _SUMMARY_KEYS}} for name, results in systems.items()]


def recording_rates(systems: Results) -> list[dict[str, Any]]:
    """WER and CER of each recording, by system."""
    by_id = {name: {row["id"]: row for row in results["recordings"]} for name, results in systems.items()}
    return [
        {
            "id": row["id"],
            "language": row["language"],
            "speaker": row["speaker"],
            "seconds": row["seconds"],
            **{rate: {name: rows[row["id"]][rate] for name, rows in by_id.items()} for rate in ("wer", "cer")},
        }
        for row in next(iter(systems.values()))["recordings"]
    ]


def word_rate_differences(systems: Results, system: str, baseline: str) -> list[float]:
    """WER of the system minus that of the baseline, for each recording with reference words."""
    baseline_rates = {row["id"]: row["wer"] for row in systems[baseline]["recordings"]}
    rates = {row["id"]: row["wer"] for row in systems[system]["recordings"]}
    return [rates[id] - rate for id, rate in baseline_rates.items() if rate is not None and rates[id] is not None]


def mode_of(results: Mapping[str, Any]) -> str:
    """Decoding mode: the inference mode if it uses windows or streaming, 'windowed' for one pass with attention over a
    limited context, 'whole' for one pass over the recording."""
    mode = results["inference"]["mode"]
    if mode in WINDOWED_MODES and results["inference"]["context_seconds"] > 0:
        return str(mode)
    if mode == "streaming":
        return "streaming"
    return "windowed" if results["context_seconds"] else "whole"


def setting_of(results: Mapping[str, Any]) -> str:
    """Label of an evaluation or, without one, its mode and context."""
    return results["label"] or f"{mode_of(results)}, {context_name(results['context_seconds'])}"


def context_name(seconds: float) -> str:
    """Context as text."""
    return f"{seconds:g} s" if seconds else "whole recordings"


def _traits(results: Mapping[str, Any]) -> dict[str, str]:
    """Settings that the points of one curve share: all except the context and settings without effect."""
    mode = mode_of(results)
    inference, encoder, decoder = (results[part] for part in ("inference", "encoder", "decoder"))
    windowed = mode in WINDOWED_MODES
    changes = {
        key: value for key, value in encoder.items() if value is not None and key not in _CONTEXT_SETTINGS.get(mode, ())
    }
    return {
        "system": f"{results['name']}\0{results['export_hash']}",
        "mode": mode,
        "overlap": f"overlap {inference['overlap']:g}" if windowed else "",
        "decoder": decoder["description"],
        "precision": inference["precision"],
        **{f"encoder.{key}": f"{key} {value}" for key, value in changes.items()},
        **{f"decoder.{key}": f"{key} {value}" for key, value in decoder.items() if key != "description"},
    }


def _same_system(curve: Mapping[str, str], whole: Mapping[str, str]) -> bool:
    ignored = ("mode", "overlap")
    return {k: v for k, v in curve.items() if k not in ignored} == {k: v for k, v in whole.items() if k not in ignored}


def _curve_names(curves: Sequence[Mapping[str, str]], systems: Results) -> list[str]:
    """Distinct names from the traits that differ; a single curve is named by its mode, overlap and decoder."""
    keys = list(dict.fromkeys(key for curve in curves for key in curve))
    differing = [key for key in keys if len({curve.get(key) for curve in curves}) > 1]
    main = [key for key in ("system", "mode", "overlap", "decoder") if key in differing]
    if "system" in main and len({curve["system"] for curve in curves}) == len(
        {(curve["system"], curve["decoder"]) for curve in curves}
    ):  # one decoder per system
        main = [key for key in main if key != "decoder"]
    main = main or ["mode", "overlap", "decoder"]
    hashes: dict[str, set[str]] = {}
    for results in systems.values():
        hashes.setdefault(results["name"], set()).add(results["export_hash"])

    def text(curve: Mapping[str, str], key: str) -> str:
        if key != "system":
            return curve.get(key, "")
        name, _, digest = curve[key].partition("\0")
        return name if len(hashes[name]) == 1 else f"{name} ({digest[:8]})"

    names = [", ".join(part for key in main if (part := text(curve, key))) for curve in curves]
    if len(set(names)) < len(names):  # for example two weights of one language model
        rest = [key for key in differing if key not in main]
        names = [
            ", ".join([name, *(part for key in rest if (part := text(curve, key)))])
            for name, curve in zip(names, curves, strict=True)
        ]
    return names
