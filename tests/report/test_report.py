"""Report pages: well-formed, self-contained, complete, and safe for hostile texts."""

import base64
import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from markupsafe import Markup
from safetensors.numpy import save_file

from bestrq.report import charts, page
from bestrq.report.comparison import Point, compare_systems, describe_systems
from bestrq.report.page import SCRIPT
from bestrq.report.result_files import SCORING
from bestrq.report.sections import (
    breakdowns_section,
    comparison_section,
    cost_section,
    cut_marks,
    examples_section,
    provenance_section,
    results_section,
)
from bestrq.report.text import (
    comparison_table,
    difference_sentence,
    few_recordings_warning,
    interval,
    rate_text,
)
from bestrq.scoring.normalisers import RULES_VERSION
from bestrq.scoring.word_errors import RecordingScore, edit_alignment, score_recording
from common.errors import UserError
from tests.made_results import make_results, write_evaluation
from tests.paths import REPOSITORY

VOID = {"meta", "img", "br", "line", "link", "input", "hr"}
HOSTILE = '<script>alert("x")</script> & \'"'


class Page(HTMLParser):
    """Checks nesting; collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.scripts += data
        else:
            self.text += data


def check_page(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "base", "audio")
        assert tag != "script" or attributes.keys() <= {"type", "class"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "data", "action"):
                assert value is not None and value.startswith("data:image/")
    run = [attributes for tag, attributes in page.tags if tag == "script" and attributes.get("type") is None]
    assert run == [{}] and SCRIPT in page.scripts  # the page's own script; the others are data
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert all(image.get("alt") for image in images)
    assert not re.search(r"url\(|@import", text)
    for _, drawing in re.findall(r"data:image/(svg)\+xml;base64,([A-Za-z0-9+/=]+)", text):
        svg = base64.b64decode(drawing).decode()
        links = re.findall(r'(?:href|src)="([^"]*)"', svg)
        assert all(link.startswith(("#", "data:")) for link in links)
        assert "<script" not in svg and "<!DOCTYPE" not in svg
    return page


def recordings(error_every: int) -> list[RecordingScore]:
    texts = {"cs": "ryba leze dirou ven", "nl": "de vis zwemt door het gat"}
    scores = []
    for i in range(12):
        language = "cs" if i % 2 else "nl"
        words = texts[language].split() * (1 + 20 * (i == 4))
        hypothesis = ["xx" if (i + k) % error_every == 0 else word for k, word in enumerate(words)]
        scores.append(score_recording(f"id-{i}", " ".join(words), " ".join(hypothesis), language, 3.0))
    return scores


def results(name: str, scores: list[RecordingScore]) -> dict:
    hostile = {"command": f"python evaluate.py --name {HOSTILE}", "label": HOSTILE, "segments": None}
    made = make_results(name, scores, **hostile)
    return made | {"decoder": {"description": f"greedy {HOSTILE}"}}


def test_quickstart_page_is_well_formed_self_contained_and_complete(tmp_path: Path) -> None:
    arguments = []
    for name, error_every in (("pretrained", 5), ("scratch", 2)):
        run, out = tmp_path / f"runs-{name}", tmp_path / f"results-{name}"
        run.mkdir()
        write_evaluation(out, name, recordings(error_every), export=str(run / "export"), command=HOSTILE)
        rows = [{"step": s, "loss": 3.0 / s, "dev_cer": 0.5 if s % 2 else None} for s in range(1, 9)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "lo')
        arguments.append(f"{name}={out}")
    pretrain = tmp_path / "pretrain"
    (pretrain / "pictures").mkdir(parents=True)
    rows = [{"step": s, "loss": 6.0, "unigram_entropy": 5.5, "accuracy": 0.1, "perplexity": 200.0} for s in (10, 20)]
    (pretrain / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generator = np.random.default_rng(0)
    mel, mask = generator.normal(size=(300, 80)).astype(np.float16), np.zeros(300, np.uint8)
    mask[50:90] = 1
    save_file({"log_mel": mel, "mask": mask}, pretrain / "pictures" / "mask_example.safetensors")
    counts = generator.integers(0, 50, size=(2, 64)).astype(np.int64)
    save_file({"counts": counts}, pretrain / "pictures" / "codebook_usage.safetensors")

    page_path = tmp_path / "sub" / "report.html"
    path = REPOSITORY / "launch" / "quickstart_report.py"
    spec = importlib.util.spec_from_file_location("quickstart_report", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(["--pretrain", str(pretrain), "--systems", *arguments, "--out", str(page_path)])
    page = check_page(page_path)
    for text in ("Results", "Pretraining", "Masked spans", "Codebook usage", "Fine-tuning", "Examples",
                   "Czech", "Dutch", "WER of scratch minus WER of pretrained", "more words", "Recordings", "MAPSSWE",
                   "By position in the recording", "Most frequent confusions", HOSTILE):  # fmt: skip
        assert text in page.text
    assert sum(tag == "img" for tag, _ in page.tags) == 12
    assert any(tag == "del" for tag, _ in page.tags) and any(tag == "ins" for tag, _ in page.tags)


def test_texts_from_files_are_escaped_everywhere(tmp_path: Path) -> None:
    picture = charts.line_chart(HOSTILE, {HOSTILE: charts.Series([1, 2], [3, 4])}, HOSTILE)
    body = page.paragraph(HOSTILE) + page.figure(HOSTILE, picture, HOSTILE)
    systems = {HOSTILE: results(HOSTILE, recordings(3)), "b": results("b", recordings(5))}
    body += Markup("").join(
        section.body
        for section in (
            results_section(systems),
            breakdowns_section(systems),
            cost_section(systems),
            comparison_section(systems, compare_systems(systems, 100)),
            examples_section(systems),
            provenance_section(systems),
        )
    )
    page.write_page(tmp_path / "page.html", HOSTILE, HOSTILE, {HOSTILE: HOSTILE}, [page.Section(HOSTILE, body)])
    assert check_page(tmp_path / "page.html").text.count("alert") > 30  # present, as text


@pytest.mark.parametrize("reference, hypothesis, expected", [
    ("a b c", "a b c", "a b c"),
    ("a b c", "a c", "a <del>b</del> c"),
    ("a c", "a b c", "a <ins>b</ins> c"),
    ("a b c", "a x c", 'a <span class="sub">x <s>b</s></span> c'),
    ("a b", "", "<del>a b</del>"),
    ("", "", '<span class="note">(empty)</span>'),
])  # fmt: skip
def test_errors_are_marked(reference: str, hypothesis: str, expected: str) -> None:
    assert page.ELEMENTS.marked_text(cut_marks(edit_alignment(reference, hypothesis), 90)) == expected


def test_long_transcripts_are_cut_at_the_same_word() -> None:
    reference = " ".join(f"w{i}" for i in range(50))
    scores = [score_recording("x", reference, reference, "cs")]
    marked = examples_section({"s": results("s", scores)}, max_words=10).body
    assert marked.count("w9 ...") == 2 and "w10" not in marked and "(40 more words)" in marked


def test_systems_on_different_recordings_or_references_are_not_compared() -> None:
    systems = {"a": results("a", recordings(3)), "b": results("b", recordings(3)[1:])}
    with pytest.raises(UserError, match="a and b were evaluated on different recordings"):
        results_section(systems)
    other = results("b", recordings(3))
    other["recordings"][2]["reference"] += " more"
    with pytest.raises(UserError, match="'id-2' has different references in a and b"):
        results_section({"a": systems["a"], "b": other})


def test_results_of_different_scoring_rules_are_not_compared() -> None:
    old, new = results("old", recordings(3)), results("new", recordings(3))
    new["versions"] = {"torch": "2", SCORING: RULES_VERSION}
    assert SCORING not in old["versions"] and compare_systems({"old": old, "same": old}, 200)
    for systems in ({"old": old, "new": new}, {"new": new, "old": old}):
        for function in (results_section, compare_systems):
            with pytest.raises(UserError, match="old was scored with version 1 .* evaluate old again"):
                function(systems)


def test_a_significant_difference_is_distinguished_from_an_insignificant_one() -> None:
    good, bad = results("good", recordings(100)), results("bad", recordings(2))
    (clear,), (doubtful,) = (compare_systems({"good": good, "other": other}, 200) for other in (bad, good))
    assert "not significant" not in difference_sentence(clear) and clear["wer"]["difference"] > 0
    assert "not significant" in difference_sentence(doubtful)


def test_differences_and_reductions_of_wer_and_cer_are_in_numbers_sentences_table_and_page() -> None:
    systems = {"bad": results("bad", recordings(2)), "good": results("good", recordings(100))}
    comparisons = compare_systems(systems, 200)
    (comparison,) = comparisons
    totals = [systems[name]["scores"]["all"] for name in ("good", "bad")]
    for rate in ("wer", "cer"):
        first, second = (total[rate] for total in totals)
        compared = comparison[rate]
        assert compared["difference"] == pytest.approx(first - second)
        assert compared["reduction"] == pytest.approx(1 - first / second)
        assert compared["reduction_interval"][0] <= compared["reduction"] <= compared["reduction_interval"][1]
        shown = f"{rate_text(compared['reduction'])} %"
        sentence = difference_sentence(comparison, rate)
        assert sentence.startswith(f"{rate.upper()} of good minus") and f"relative reduction {shown}" in sentence
        table = comparison_table({"systems": describe_systems(systems), "comparisons": comparisons})
        assert interval(compared["reduction_interval"]) in table and shown in table.splitlines()[-1]
        body = comparison_section(systems, comparisons).body
        assert f"{rate.upper()} reduction, %" in body
        assert body.count(interval(compared["reduction_interval"])) >= 2, "in the sentence and in the table"
    assert table.splitlines()[-2].startswith("minus bad")


def test_the_rules_of_each_normaliser_are_listed() -> None:
    scores = [score_recording("a", "die gro\u00dfe", "die grosse", "de"), score_recording("b", "x", "y", "es")]
    body = provenance_section({"a": results("a", scores)}).body
    for text in ("normaliser unicode+de", "becomes &#39;ss&#39;: sharp s is ss", "without specific rules: es"):
        assert text in body


def test_examples_cover_low_and_high_rates_with_each_recording_once() -> None:
    made = results("a", recordings(3))
    body = examples_section({"a": made}, count=5).body
    assert body.count("<article") == 5
    assert examples_section({"a": made | {"recordings": made["recordings"][:1]}}).body.count("<article") == 1


def test_mask_spans_are_the_runs_of_true() -> None:
    assert charts.mask_spans(np.array([1, 1, 0, 1, 0, 0, 1], bool)) == [(0, 2), (3, 4), (6, 7)]
    assert charts.mask_spans(np.zeros(3, bool)) == []


@pytest.mark.filterwarnings("error")
def test_charts_with_long_names_have_room_for_the_axes() -> None:
    names = [
        f"{'runs-of-a-long-name/' * 6}{k}, averaged 20 s, overlap 0.875, beam 8 with language model" for k in range(6)
    ]
    shares = {name: {"substitutions": 0.1, "deletions": 0.2, "insertions": 0.1} for name in names}
    bins = {name: [charts.Bin(0.1, None)] for name in names}
    for picture in (charts.kinds_chart(shares, "words"), charts.bins_chart("x", ["a"], bins, "x")):
        assert "data:image/svg" in picture  # and matplotlib does not warn that the axes have no space


def test_names_are_drawn_as_they_are() -> None:
    lines = {"_a$b^c$": [Point(5.0, 0.1, None)], "b": [Point(5.0, 0.2, (0.1, 0.3))]}
    drawing = charts.context_svg(lines, "WER")
    assert "_a$b^c$" in drawing and ">b<" in drawing  # neither a formula nor missing from the legend


def test_a_corpus_dominated_by_one_long_recording_has_a_warning() -> None:
    def row(words: int) -> dict[str, int]:
        return {"word_hits": words - 1, "word_substitutions": 1, "word_deletions": 0, "word_insertions": 9}

    even = {"recordings": [row(100) for _ in range(10)]}
    uneven = {"recordings": [*(row(10) for _ in range(30)), row(900)]}
    assert few_recordings_warning(even) == "" == few_recordings_warning({"recordings": []})
    # (30 * 10 + 900)^2 / (30 * 100 + 810,000)
    expected = "One recording has 75% of the words. The effective number of recordings is only 1.8 of 31"
    assert few_recordings_warning(uneven).startswith(expected)


def test_a_difference_is_significant_if_both_bootstraps_agree() -> None:
    def sentence(interval: tuple[float, float], probability: float) -> str:
        wer = {"difference": 0.02, "interval": interval, "probability_first_better": probability}
        return difference_sentence({"system": "a", "baseline": "b", "wer": wer})

    verdict = "not significant"
    assert verdict not in sentence((0.01, 0.03), 0.001)
    assert verdict in sentence((-0.01, 0.03), 0.2) and verdict in sentence((0.01, 0.03), 0.1)
