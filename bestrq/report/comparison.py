"""Numbers out of several evaluations: which lines a curve over contexts has, and how systems differ.

Evaluations are `results.json` as they were read, by the name that a report calls them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from bestrq.report import tables
from bestrq.report.curves import Point, context_name
from bestrq.report.results import SCORING
from bestrq.scoring.word_errors import ErrorCounts, RecordingScore, compare
from common.errors import UserError

Results = Mapping[str, Mapping[str, Any]]
"""results.json by system"""

KINDS = ("hits", "substitutions", "deletions", "insertions")
FEW_RECORDINGS = 5
WINDOWED_MODES = ("buffered", "averaged", "stitched")
# Settings of the encoder that are the context itself; in other modes they are settings like any other.
_CONTEXT_SETTINGS = {"windowed": ("mask", "window"), "whole": ("mask", "window"), "streaming": ("mask", "left_chunks")}
_CELL_KEYS = (
    "label", "name", "export", "export_hash", "dataset", "command", "versions", "device", "context_seconds",
    "inference", "encoder", "decoder", "decoding", "scores", "segments", "positions", "edge_distances", "speakers",
    "durations", "confusions", "normalisers",
)  # fmt: skip


def recording_score(row: Mapping[str, Any]) -> RecordingScore:
    """What `RecordingScore.row` made a row of."""
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
    """Every other system beside the first, on the same recordings.

    Returns:
        `Comparison.summary()` of each with the names under "system" and "baseline". Differences are the system's less
        the baseline's: negative where the system is better.

    Raises:
        UserError: recordings, references or scoring rules differ.
    """
    (baseline, results), *others = systems.items()
    first = [recording_score(row) for row in results["recordings"]]
    check_same_rules(systems)
    found = []
    for name, other in others:
        try:
            compared = compare([recording_score(row) for row in other["recordings"]], first, num_resamples)
        except UserError as error:
            raise UserError(f"{name} and {baseline} cannot be compared: {error}") from error
        found.append({"system": name, "baseline": baseline, **compared.summary()})
    return found


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
    wanted = {row["id"]: row["reference"] for row in results["recordings"]}
    for name, other in others:
        mine = {row["id"]: row["reference"] for row in other["recordings"]}
        if mine.keys() != wanted.keys():
            raise UserError(f"{first} and {name} were evaluated on different recordings: evaluate both on the same")
        if different := [id for id in wanted if wanted[id] != mine[id]]:
            raise UserError(
                f"recording {different[0]!r} has one reference in {first} and another in {name} ({len(different)} such "
                "recordings): score both by the same data and normaliser"
            )


def context_curves(systems: Results) -> dict[str, list[Point]]:
    """Lines of WER over context: points of the same system, mode, overlap and decoder, with the whole recording last.

    A line is named by what tells it from the others. Whole recordings, which know no overlap and no mode, end every
    line of the same system and decoder. A line is here even if it has but one point. Streams of which it is not known
    what a frame sees are left out.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Point]] = {}
    for name, results in systems.items():
        total = results["scores"]["all"]
        known = results["context_seconds"] > 0 or mode_of(results) == "whole"
        if known and total["wer"] is not None:
            point = Point(float(results["context_seconds"]), total["wer"], total["wer_interval"], name)
            groups.setdefault(tuple(_traits(results).items()), []).append(point)
    lines = {key: points for key, points in groups.items() if dict(key)["mode"] != "whole"}
    for key, points in groups.items():
        if dict(key)["mode"] == "whole":
            ended = [line for line in lines if _same_system(dict(line), dict(key))]
            if not ended:
                lines[key] = []
            for line in ended or [key]:
                lines[line] = lines[line] + points
    names = _line_names([dict(key) for key in lines], systems)
    return {
        name: sorted(points, key=lambda one: (one.context_seconds == 0, one.context_seconds))
        for name, points in zip(names, lines.values(), strict=True)
    }


def is_curve(curves: Mapping[str, Sequence[Point]]) -> bool:
    """Whether there are two contexts or more: what is worth a picture."""
    return len({point.context_seconds for points in curves.values() for point in points}) > 1


def describe_systems(systems: Results) -> list[dict[str, Any]]:
    """Every number of the evaluations but those of single recordings."""
    return [{"system": name, **{key: results.get(key) for key in _CELL_KEYS}} for name, results in systems.items()]


def recording_rates(systems: Results) -> list[dict[str, Any]]:
    """Rates of every recording, by system."""
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


def mode_of(results: Mapping[str, Any]) -> str:
    """How a recording was cut: the mode of inference, or 'windowed' for attention of that context in one pass, or
    'whole' for one pass over all of it."""
    mode = results["inference"]["mode"]
    if mode in WINDOWED_MODES and results["inference"]["context_seconds"] > 0:
        return str(mode)
    if mode == "streaming":
        return "streaming"
    return "windowed" if results["context_seconds"] else "whole"


def setting_of(results: Mapping[str, Any]) -> str:
    """An evaluation's own label; where it has none, its mode and context."""
    return results["label"] or f"{mode_of(results)}, {context_name(results['context_seconds'])}"


def _traits(results: Mapping[str, Any]) -> dict[str, str]:
    """What a line of a curve has in common: all settings but the context and what has no influence."""
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


def _same_system(line: Mapping[str, str], whole: Mapping[str, str]) -> bool:
    ignored = ("mode", "overlap")
    return {k: v for k, v in line.items() if k not in ignored} == {k: v for k, v in whole.items() if k not in ignored}


def _line_names(lines: Sequence[Mapping[str, str]], systems: Results) -> list[str]:
    """What tells lines apart; a single one is called by its mode, overlap and decoder. All are different."""
    keys = list(dict.fromkeys(key for line in lines for key in line))
    differing = [key for key in keys if len({line.get(key) for line in lines}) > 1]
    main = [key for key in ("system", "mode", "overlap", "decoder") if key in differing]
    if "system" in main and len({line["system"] for line in lines}) == len(
        {(line["system"], line["decoder"]) for line in lines}
    ):  # each has but one
        main = [key for key in main if key != "decoder"]
    main = main or ["mode", "overlap", "decoder"]
    hashes: dict[str, set[str]] = {}
    for results in systems.values():
        hashes.setdefault(results["name"], set()).add(results["export_hash"])

    def text(line: Mapping[str, str], key: str) -> str:
        if key != "system":
            return line.get(key, "")
        name, _, digest = line[key].partition("\0")
        return name if len(hashes[name]) == 1 else f"{name} ({digest[:8]})"

    names = [", ".join(part for key in main if (part := text(line, key))) for line in lines]
    if len(set(names)) < len(names):  # the same description, and another weight of a language model, say
        rest = [key for key in differing if key not in main]
        names = [
            ", ".join([name, *(part for key in rest if (part := text(line, key)))])
            for name, line in zip(names, lines, strict=True)
        ]
    return names


def word_rate_differences(systems: Results, second: str, first: str) -> list[float]:
    """WER of the second less that of the first, for every recording with words."""
    before = {row["id"]: row["wer"] for row in systems[first]["recordings"]}
    after = {row["id"]: row["wer"] for row in systems[second]["recordings"]}
    return [after[id] - rate for id, rate in before.items() if rate is not None and after[id] is not None]


def difference_sentence(compared: Mapping[str, Any]) -> str:
    """The difference in WER in words; says so where the systems cannot be told apart."""
    start = f"WER of {compared['system']} less that of {compared['baseline']}"
    if compared["wer"] is None:
        return f"{start}: there is no reference word."
    text, bounds = f"{start}: {tables.points(compared['wer']['difference'])} points", compared["wer"]["interval"]
    if bounds is None:
        return f"{text}; too few recordings for an interval."
    # Where one recording has most of the words, the two ways of resampling may disagree: then neither settles it.
    settled = (bounds[0] > 0 or bounds[1] < 0) and not 0.025 <= compared["wer"]["probability_first_better"] <= 0.975
    clear = "" if settled else ", so the two cannot be told apart here"
    return f"{text} (95 % interval {tables.interval(bounds, signed=True)}{clear})."


def p_text(p_value: float) -> str:
    """A p value; one too small to tell is said to be so."""
    return f"{p_value:.3f}" if p_value >= 0.001 else "< 0.001"


def words_in_few_recordings(results: Mapping[str, Any]) -> str:
    """A warning where so few recordings have most of the words that intervals say little; else nothing.

    Equally long ones that would vary as much count: (sum of words)^2 / sum of squares (Kish 1965, section 11.7).
    """
    words = [row["word_hits"] + row["word_substitutions"] + row["word_deletions"] for row in results["recordings"]]
    total, squares = sum(words), sum(count * count for count in words)
    if not total or total * total >= FEW_RECORDINGS * squares:
        return ""
    return (
        f"One recording has {max(words) / total:.0%} of the words: for the spread of rates, {len(words)} recordings "
        f"count as {total * total / squares:.1f} equal ones, and intervals say little."
    )
