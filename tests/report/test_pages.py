"""Pages of evaluations: numbers equal those of `scoring`; sorting, searching and playback work in a real browser."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bestrq.report.comparison import context_curves
from bestrq.report.reports import write_comparison, write_evaluation_report
from bestrq.report.sections import MAX_STRETCH_WORDS, stretches
from bestrq.report.text import p_text
from bestrq.scoring.word_errors import RecordingScore, compare
from common.errors import UserError
from tests.made_results import make_results, make_transcripts, score_all, write_evaluation
from tests.report.test_report import check_page
from tools import compare as script

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
REFERENCE = "a b c d e f g h i j k l m n o p q r s t".split()


def hypothesis(wrong: Sequence[int], words: Sequence[str] = REFERENCE) -> str:
    return " ".join("xx" if place in wrong else word for place, word in enumerate(words))


def systems_of(error_every: int, count: int = 12) -> list[RecordingScore]:
    """Scores in which every `error_every`-th recording has errors: as many as its number."""
    texts = {
        f"rec-{i:02d}": (" ".join(REFERENCE), hypothesis(range(i % len(REFERENCE)) if i % error_every == 0 else ()))
        for i in range(count)
    }
    return score_all(texts, speakers={id: f"speaker {id[-1]}" for id in texts})


CHECKED = """
<script>%s</script>
<script>document.documentElement.dataset.policy = "broken";</script>
"""

SELF_CHECK = """
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const ids = () => [...document.querySelectorAll(".recordings tbody tr")].filter((row) => !row.hidden)
  .map((row) => row.cells[0].textContent);
const press = (selector, place = 0) => document.querySelectorAll(selector)[place].click();
async function search(text) {
  const input = document.querySelector(".recordings input");
  input.value = text;
  input.dispatchEvent(new Event("input"));
  await wait(400);
  return ids();
}
(async () => {
  const out = {};
  const heads = [...document.querySelectorAll(".recordings th")];
  const sort = (title) => heads.find((head) => head.textContent === title).querySelector("button").click();
  sort("WER, %"); out.worst = ids();
  sort("WER, %"); out.best = ids();
  sort("Recording"); out.names = ids();
  out.byId = await search("PLAIN");
  out.byReference = await search("three four");
  out.byHypothesis = await search("zzz");
  out.byMissing = await search("not there");
  out.count = document.querySelector(".recordings output").textContent;
  out.all = (await search("")).length;
  [...document.querySelectorAll(".recordings button.open")].find((button) => button.textContent === "hard").click();
  const dialog = document.querySelector("dialog");
  out.open = dialog.open;
  out.texts = ["del", "ins", ".sub", ".right"].map((kind) => [...dialog.querySelectorAll(".block " + kind)]
    .map((element) => element.textContent));
  out.titles = [...dialog.querySelectorAll(".block del, .block ins, .block .sub")].map((element) => element.title);
  const audio = dialog.querySelector("audio");
  out.preload = audio.getAttribute("preload");
  press("dialog .next"); out.next = dialog.querySelector(".tools output").textContent;
  press("dialog .previous"); press("dialog .previous"); out.last = dialog.querySelector(".tools output").textContent;
  out.current = dialog.querySelectorAll(".current").length;
  out.beforePlaying = audio.currentTime;
  dialog.querySelector(".block .sub").click();
  out.playedFrom = audio.currentTime;
  for (let k = 0; k < 2000 && !(audio.duration > 0); k++) {
    for (let spent = 0; spent < 2e6; spent++); // the file is read in real time, and time here is virtual
    await wait(10);
  }
  out.duration = audio.duration;
  out.playing = !audio.paused;
  dialog.querySelector(".errors").open = true;
  await wait(200);
  out.list = [...dialog.querySelectorAll(".errors li")].map((item) => item.textContent);
  press("dialog .close");
  for (let k = 0; k < 20 && document.querySelector("dialog"); k++) await wait(100);
  out.closed = document.querySelector("dialog") === null;
  out.scripts = document.querySelectorAll("b#evil").length;
  out.policy = document.documentElement.dataset.policy || "kept";
  const outcome = document.createElement("pre");
  outcome.id = "outcome";
  outcome.textContent = JSON.stringify(out);
  document.body.append(outcome);
})();
"""


def browse(page: Path, check: str) -> dict[str, Any]:
    """Result of a script in a copy of the page whose policy allows the script by its hash, and blocks a second one."""
    text = page.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(check.encode()).digest()).decode()
    text = text.replace("script-src ", f"script-src 'sha256-{digest}' ", 1).replace(
        "</body>", CHECKED % check + "</body>"
    )
    copy = page.with_name("checked.html")
    copy.write_text(text, encoding="utf-8")
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               "--autoplay-policy=no-user-gesture-required", f"--user-data-dir={page.parent / 'profile'}",
               "--virtual-time-budget=60000", "--dump-dom", copy.as_uri()]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True)
    match = re.search(r'<pre id="outcome">(.*?)</pre>', shown.stdout, re.DOTALL)
    assert match, f"the check did not finish: {shown.stderr[-2000:]}"
    return json.loads(match[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed to open the page with")
def test_sorting_searching_transcripts_and_playback_work_in_a_browser(tmp_path: Path) -> None:
    evil = "</script><b id=evil>&lt;!--<script>"
    texts = {
        "hard": ("one two three four five six", "one three zzz five six nine nine"),
        "plain": ("one two", "one two"),
        "fifth": (" ".join(REFERENCE), hypothesis([5])),
        "tenth": (" ".join(REFERENCE), hypothesis([3, 4])),
        "ninth": (" ".join(REFERENCE), hypothesis(range(18))),
        f"rec {evil}": ("one", "one"),
    }
    scores = score_all(texts, speakers=dict.fromkeys(texts, f"speaker {evil}"))
    transcripts = make_transcripts(scores)
    transcripts[-1]["alignment"] = [["S", evil, evil, 0.5]]
    with wave.open(str(tmp_path / "hard audio.wav"), "wb") as audio:
        audio.setnchannels(1)
        audio.setsampwidth(1)
        audio.setframerate(4000)
        audio.writeframes(b"\x80" * 40_000)
    write_evaluation_report(tmp_path, make_results(evil, scores), transcripts, {"hard": "hard%20audio.wav"})
    page = check_page(tmp_path / "report.html")
    assert all(id in page.text for id in texts)  # the table is complete without the script
    out = browse(tmp_path / "report.html", SELF_CHECK)
    # 90.0, 66.7, 10.0, 5.0: as text, 5.0 would come before 10.0
    expected = ["ninth", "hard", "tenth", "fifth"]
    assert out["worst"][:4] == expected and out["best"][-4:] == expected[::-1]
    assert out["names"] == sorted(texts)
    assert out["byId"] == ["plain"] and out["byReference"] == ["hard"] and out["byHypothesis"] == ["hard"]
    assert out["byMissing"] == [] and out["count"] == "0 of 6" and out["all"] == 6
    assert out["open"] and out["closed"]
    assert out["texts"] == [["two"], ["nine", "nine"], ["zzz four"], ["one", "three", "five six"]]
    assert out["titles"] == ["0:00.8", "0:01.8", "0:02.8", "0:03.2"]
    assert (out["next"], out["last"]) == ("error 1 of 4, at 0:00.8", "error 3 of 4, at 0:02.8")
    assert out["current"] == 1
    assert out["list"][1] == "0:01.8 four \u2192 zzz"
    assert out["preload"] == "none" and out["beforePlaying"] == 0
    assert out["playedFrom"] == pytest.approx(0.8) and out["duration"] == 10 and out["playing"]
    assert out["scripts"] == 0 and out["policy"] == "kept"


def test_a_comparison_has_the_numbers_of_scoring_with_the_first_as_the_baseline(tmp_path: Path) -> None:
    first, second = systems_of(2), systems_of(3)
    folders = {
        "first": write_evaluation(tmp_path / "1", "a", first),
        "second": write_evaluation(tmp_path / "2", "bb", second[::-1]),
    }
    numbers = write_comparison(tmp_path / "out", folders, {}, 300)
    expected = compare(second[::-1], first, 300).summary()
    assert numbers["comparisons"] == [{"system": "second", "baseline": "first", **expected}]
    assert numbers["comparisons"][0]["wer"]["difference"] < 0  # the second has fewer errors
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(json.dumps(numbers))
    assert [system["scores"]["all"]["wer"] for system in numbers["systems"]] == [
        make_results("x", scores)["scores"]["all"]["wer"] for scores in (first, second)
    ]
    assert numbers["recordings"][4]["wer"] == {"first": 4 / 20, "second": 0.0}
    page = check_page(tmp_path / "out" / "report.html")
    # Recording 4 has errors in the first system only.
    errors = '[0.2,"a","xx"],[0.8,"b","xx"],[1.2,"c","xx"],[1.8,"d","xx"]'
    right = '[[0.2,"a b c d e f g h i j k l"],[6.2,"m n o p q r s t"]]'
    assert f'[[{errors},[2.2,"e f g h i j k l m n o p"],[8.2,"q r s t"]],{right}]' in page.scripts
    for text in ("Differences from first", "MAPSSWE", "second minus first", "speaker 3", "WER of second, %", "0.0250"):
        assert text in page.text


def test_evaluations_of_other_recordings_or_references_are_not_compared(tmp_path: Path) -> None:
    folders = {name: write_evaluation(tmp_path / name, name, systems_of(2)) for name in ("a", "b")}
    folders["c"] = write_evaluation(tmp_path / "c", "c", systems_of(2)[:-1])
    with pytest.raises(UserError, match="a and c were evaluated on different recordings"):
        write_comparison(tmp_path / "out", folders, {}, 100)
    with pytest.raises(UserError, match="no evaluation"):
        write_comparison(tmp_path / "out", {}, {}, 100)
    assert not (tmp_path / "out").exists()


def test_points_of_a_curve_share_all_settings_but_the_context_and_end_with_the_whole_recording() -> None:
    scores = systems_of(2)
    cells = {
        "b-80": make_results("a", scores, 80.0),
        "b-5": make_results("a", scores, 5.0),
        "b-0": make_results("a", scores, 0.0),
        "w-5": make_results("a", scores, 5.0, "windowed"),
        "other": make_results("bb", scores, 5.0),
        "stream": make_results("a", scores, 0.0, "streaming"),
    }
    curves = {name: [point.system for point in points] for name, points in context_curves(cells).items()}
    assert curves == {
        "a, buffered, overlap 0.25": ["b-5", "b-80", "b-0"],
        "a, windowed": ["w-5", "b-0"],
        "bb, buffered, overlap 0.25": ["other"],
    }
    cells["b-80"]["decoder"] |= {"language_model_weight": 0.5}  # same description, but another name
    names = list(context_curves({name: cells[name] for name in ("b-80", "b-5")}))
    assert len(names) == 2 and "language_model_weight 0.5" in names[0]
    assert list(context_curves({"x": cells["b-0"]})) == ["whole, greedy"]


def test_two_contexts_are_drawn_as_a_curve_and_a_stale_curve_is_removed(tmp_path: Path) -> None:
    scores = systems_of(2, 4)
    folders = {str(c): write_evaluation(tmp_path / str(c), "a", scores, c) for c in (5.0, 20.0, 0.0)}
    numbers = write_comparison(tmp_path / "out", folders, {}, 100)
    drawing = (tmp_path / "out" / "curve.svg").read_text()
    assert drawing.startswith("<svg") and ">whole<" in drawing and ">20<" in drawing
    assert [point["context_seconds"] for point in numbers["curves"][0]["points"]] == [5.0, 20.0, 0.0]
    write_comparison(tmp_path / "out", {"5.0": folders["5.0"]}, {}, 100)
    assert not (tmp_path / "out" / "curve.svg").exists()


def test_tables_hold_many_evaluations_and_show_the_recordings_of_six(tmp_path: Path) -> None:
    scores = systems_of(2, 3)
    folders = {f"cell {k}": write_evaluation(tmp_path / str(k), "a", scores, 5.0 * k) for k in range(1, 9)}
    numbers = write_comparison(tmp_path / "out", folders, {}, 100)
    page = check_page(tmp_path / "out" / "report.html")
    assert len(numbers["systems"]) == 8 and len(numbers["comparisons"]) == 7
    assert "the first 6 of 8 evaluations" in page.text and "WER of cell 6, %" in page.text
    assert "cell 8" in page.text and "WER of cell 7, %" not in page.text


def test_rates_by_segments_are_listed_with_those_of_whole_recordings(tmp_path: Path) -> None:
    scores = systems_of(2)
    by_segments = make_results("a", systems_of(1))["scores"]
    write_evaluation_report(tmp_path, make_results("a", scores, segments=by_segments), make_transcripts(scores), {})
    text = check_page(tmp_path / "report.html").text
    assert "a, by segments" in text and f"{100 * by_segments['all']['wer']:.1f}" in text


@pytest.mark.parametrize("part", ["edge_distances", "speakers", "positions"])
def test_missing_breakdowns_are_left_out(tmp_path: Path, part: str) -> None:
    scores = score_all({"one": ("a b", ""), "none": ("", "c")})
    results = make_results("a", scores, **{part: {} if part == "speakers" else []})
    results["decoding"]["peak_mb"] = None
    write_evaluation_report(tmp_path, results, make_transcripts(scores), {})
    check_page(tmp_path / "report.html")


def test_stretches_keep_every_step_of_an_alignment_in_order() -> None:
    alignment = [["=", f"w{k}", f"w{k}", k / 10] for k in range(30)]
    alignment[20:20] = [["S", "old", "new", 2.0], ["D", "gone", "", 2.1], ["I", "", "more", 2.2]]
    parts = list(stretches(alignment))
    assert [len(part) for part in parts] == [2, 2, 3, 3, 3, 2]
    assert max(len(part[1].split()) for part in parts if len(part) == 2) == MAX_STRETCH_WORDS
    assert " ".join(part[-1] for part in parts if part[-1]) == " ".join(step[2] for step in alignment if step[2])
    assert " ".join(part[1] for part in parts if part[1]) == " ".join(step[1] for step in alignment if step[1])
    assert parts[1][0] == 1.2 and parts[-1][0] == 2.0


def test_the_script_names_evaluations_by_the_parts_of_their_paths_that_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, every in (("a", 2), ("sweep/x", 3), ("sweep/y", 4)):
        write_evaluation(tmp_path / place, "same", systems_of(every))
    out = tmp_path / "out"
    arguments = ["--results", str(tmp_path / "a"), str(tmp_path / "sweep"), "--resamples", "100", "--out", str(out)]
    script.main(arguments)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:4]] == ["a", "sweep/x", "sweep/y"]
    assert p_text(0.5) == "0.500" and "report.json" in printed[-1] and "curve.svg" not in printed[-1]
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "rec-03.wav").touch()
    script.main([*arguments, "--names", "one", "two", "three", "--audio", str(tmp_path / "audio")])
    scripts = check_page(out / "report.html").scripts
    assert scripts.count('"audio":"file:///') == 1 and scripts.count('"audio":null') == 11
    assert [system["system"] for system in json.loads((out / "report.json").read_text())["systems"]] == [
        "one",
        "two",
        "three",
    ]
    with pytest.raises(UserError, match="names = one, one, two: give 3 different"):
        script.main([*arguments, "--names", "one", "one", "two"])
    with pytest.raises(UserError, match="results is missing"):
        script.main([])
    with pytest.raises(UserError, match="no results.json"):
        script.main(["--results", str(tmp_path / "nowhere")])
