"""The report: a well-formed page that needs nothing but itself, and that shows what it was given."""

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from bestrq.config import ConfigError
from bestrq.recognition import charts, report
from bestrq.recognition.scoring import RecordingScore, score_by_language, score_recording
from bestrq.recognition.sections import read_results, results_section, transcripts_section

VOID = {"meta", "img", "br", "line", "link", "input", "hr"}
HOSTILE = '<script>alert("x")</script> & \'"'


class Page(HTMLParser):
    """Checks nesting; collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
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
        self.text += data


def check_page(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "data", "action"):
                assert value is not None and value.startswith("data:image/")
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
        heard = ["xx" if (i + k) % error_every == 0 else word for k, word in enumerate(words)]
        scores.append(score_recording(f"id-{i}", " ".join(words), " ".join(heard), language, 3.0))
    return scores


def results(name: str, scores: list[RecordingScore], run: Path) -> dict:
    return {
        "name": name,
        "export": str(run / "export"),
        "export_hash": "ab" * 32,
        "command": f"python evaluate.py --name {HOSTILE}",
        "dataset": {"path": "datasets/x", "split": "test", "fingerprint": "cd" * 32, "feature_hash": "ef" * 32},
        "decoder": {"description": f"greedy {HOSTILE}"},
        "versions": {"torch": "2"},
        "scores": {language: total.summary() for language, total in score_by_language(scores, 200).items()},
        "recordings": [one.row() for one in scores],
    }


def test_quickstart_page_is_well_formed_self_contained_and_complete(tmp_path: Path) -> None:
    arguments = []
    for name, error_every in (("pretrained", 5), ("scratch", 2)):
        run, out = tmp_path / f"runs-{name}", tmp_path / f"results-{name}"
        run.mkdir()
        out.mkdir()
        (out / "results.json").write_text(json.dumps(results(name, recordings(error_every), run)))
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
    script = Path(__file__).parents[1] / "launch" / "quickstart_report.py"
    options = ["--pretrain", str(pretrain), "--systems", *arguments, "--out", str(page_path)]
    run_script = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, cwd=tmp_path)
    assert run_script.returncode == 0, run_script.stderr
    page = check_page(page_path)
    for wanted in ("Results", "Pretraining", "What is hidden", "Use of the codebook", "Fine-tuning", "Transcripts",
                   "Czech", "Dutch", "CER of pretrained less that of scratch", "more words", HOSTILE):  # fmt: skip
        assert wanted in page.text
    assert sum(tag == "img" for tag, _ in page.tags) == 9
    assert any(tag == "del" for tag, _ in page.tags) and any(tag == "ins" for tag, _ in page.tags)


def test_texts_from_files_are_escaped_everywhere(tmp_path: Path) -> None:
    sample = report.Sample(HOSTILE, HOSTILE, f"{HOSTILE} same", {HOSTILE: f"same {HOSTILE} {HOSTILE}"}, {HOSTILE: 0.5})
    picture = charts.line_chart(HOSTILE, {HOSTILE: charts.Series([1, 2], [3, 4])}, HOSTILE)
    body = (
        report.transcripts([sample])
        + report.facts({HOSTILE: HOSTILE})
        + report.commands([HOSTILE])
        + report.paragraph(HOSTILE)
        + report.figure(HOSTILE, picture, HOSTILE)
    )
    systems = {HOSTILE: results("a", recordings(3), tmp_path)}
    body += results_section(systems).body
    report.write_report(tmp_path / "page.html", HOSTILE, HOSTILE, {HOSTILE: HOSTILE}, [report.Section(HOSTILE, body)])
    page = check_page(tmp_path / "page.html")
    assert page.text.count("alert") > 15  # it is there, as text


@pytest.mark.parametrize("reference, hypothesis, expected", [
    ("a b c", "a b c", "a b c"),
    ("a b c", "a c", "a <del>b</del> c"),
    ("a c", "a b c", "a <ins>b</ins> c"),
    ("a b c", "a x c", 'a <span class="sub">x <s>b</s></span> c'),
    ("a b", "", "<del>a b</del>"),
    ("", "", '<span class="note">(nothing)</span>'),
])  # fmt: skip
def test_errors_are_marked(reference: str, hypothesis: str, expected: str) -> None:
    sample = report.Sample("x", "cs", reference, {"s": hypothesis}, {"s": None})
    assert f"<dd>{expected}</dd>" in report.transcripts([sample]).split("<dt><b>s</b>")[1]


def test_long_transcripts_are_cut_at_the_same_word() -> None:
    reference = " ".join(f"w{i}" for i in range(50))
    marked = report.transcripts([report.Sample("x", "cs", reference, {"s": reference}, {"s": 0.0})], max_words=10)
    assert marked.count("w9 ...") == 2 and "w10" not in marked and "(40 more words)" in marked


def test_systems_on_different_recordings_are_not_compared(tmp_path: Path) -> None:
    systems = {"a": results("a", recordings(3), tmp_path), "b": results("b", recordings(3)[1:], tmp_path)}
    with pytest.raises(ConfigError, match="a and b were evaluated on different recordings"):
        results_section(systems)
    with pytest.raises(ConfigError, match="Run evaluate.py with --out"):
        read_results(tmp_path / "nowhere")


def test_a_clear_difference_and_a_doubtful_one_are_told_apart(tmp_path: Path) -> None:
    good, bad = results("good", recordings(100), tmp_path), results("bad", recordings(2), tmp_path)
    assert "cannot be told apart" not in results_section({"good": good, "bad": bad}).body
    assert "cannot be told apart" in results_section({"good": good, "same": good}).body


def test_samples_cover_easy_and_hard_recordings_once(tmp_path: Path) -> None:
    one = results("a", recordings(3), tmp_path)
    body = transcripts_section({"a": one}, count=5).body
    assert body.count("<article") == 5
    assert transcripts_section({"a": one | {"recordings": one["recordings"][:1]}}).body.count("<article") == 1


def test_mask_spans_are_the_runs_of_true() -> None:
    assert charts.mask_spans(np.array([1, 1, 0, 1, 0, 0, 1], bool)) == [(0, 2), (3, 4), (6, 7)]
    assert charts.mask_spans(np.zeros(3, bool)) == []
