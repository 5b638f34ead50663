"""Pages of evaluations: the numbers are those of `scoring`, and in a real browser a reader can sort, search, open a
transcript and listen."""

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

import compare as script
from bestrq.config import ConfigError
from bestrq.recognition import comparison, pages, sections
from bestrq.recognition.recordings import LONGEST, stretches
from bestrq.recognition.scoring import RecordingScore, compare
from tests.made_results import make_results, make_transcripts, score_all, write_evaluation
from tests.test_report import check_page

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SAID = "a b c d e f g h i j k l m n o p q r s t".split()


def heard(wrong: Sequence[int], words: Sequence[str] = SAID) -> str:
    return " ".join("xx" if place in wrong else word for place, word in enumerate(words))


def systems_of(error_every: int, count: int = 12) -> list[RecordingScore]:
    """Recordings of which every so-manyth has as many errors as its number says."""
    texts = {
        f"rec-{i:02d}": (" ".join(SAID), heard(range(i % len(SAID)) if i % error_every == 0 else ()))
        for i in range(count)
    }
    return score_all(texts, speakers={id: f"speaker {id[-1]}" for id in texts})


CHECK = """
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
  const head = (title) => [...document.querySelectorAll(".recordings th")].findIndex((one) => one.textContent === title);
  const sort = (title) => document.querySelectorAll(".recordings th")[head(title)].querySelector("button").click();
  sort("WER, %"); out.worst = ids();
  sort("WER, %"); out.best = ids();
  sort("Recording"); out.names = ids();
  out.byId = await search("PLAIN");
  out.bySaid = await search("three four");
  out.byHeard = await search("zzz");
  out.byNothing = await search("not there");
  out.count = document.querySelector(".recordings output").textContent;
  out.all = (await search("")).length;
  [...document.querySelectorAll(".recordings button.open")].find((one) => one.textContent === "hard").click();
  const dialog = document.querySelector("dialog");
  out.open = dialog.open;
  out.texts = ["del", "ins", ".sub", ".right"].map((kind) => [...dialog.querySelectorAll(".block " + kind)]
    .map((one) => one.textContent));
  out.titles = [...dialog.querySelectorAll(".block del, .block ins, .block .sub")].map((one) => one.title);
  const audio = dialog.querySelector("audio");
  out.preload = audio.getAttribute("preload");
  press("dialog .next"); out.next = dialog.querySelector(".tools output").textContent;
  press("dialog .previous"); press("dialog .previous"); out.last = dialog.querySelector(".tools output").textContent;
  out.current = dialog.querySelectorAll(".current").length;
  out.beforePlaying = audio.currentTime;
  dialog.querySelector(".block .sub").click();
  out.playedFrom = audio.currentTime;
  await wait(1500);
  out.duration = audio.duration;
  out.playingAt = audio.currentTime;
  dialog.querySelector(".errors").open = true;
  await wait(200);
  out.list = [...dialog.querySelectorAll(".errors li")].map((one) => one.textContent);
  press("dialog .close"); await wait(200);
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
    """What a script writes that is let into a copy of the page by its hash, as the page's own is; another is not."""
    text = page.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(check.encode()).digest()).decode()
    text = text.replace("script-src ", f"script-src 'sha256-{digest}' ", 1).replace(
        "</body>", CHECK % check + "</body>"
    )
    copy = page.with_name("checked.html")
    copy.write_text(text, encoding="utf-8")
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               "--autoplay-policy=no-user-gesture-required", f"--user-data-dir={page.parent / 'profile'}",
               "--virtual-time-budget=15000", "--dump-dom", copy.as_uri()]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r'<pre id="outcome">(.*?)</pre>', shown.stdout, re.DOTALL)
    assert found, f"the check did not run to its end: {shown.stderr[-2000:]}"
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed to open the page with")
def test_in_a_browser_a_reader_sorts_searches_opens_a_transcript_and_listens(tmp_path: Path) -> None:
    evil = "</script><b id=evil>&lt;!--<script>"
    texts = {
        "hard": ("one two three four five six", "one three zzz five six six six"),
        "plain": ("one two", "one two"),
        "tenth": (" ".join(SAID), heard([3, 4])),
        "ninth": (" ".join(SAID), heard(range(18))),
        f"rec {evil}": ("one", "one"),
    }
    scores = score_all(texts, speakers={id: f"speaker {evil}" for id in texts})
    transcripts = make_transcripts(scores)
    transcripts[-1]["alignment"] = [["S", evil, evil, 0.5]]
    with wave.open(str(tmp_path / "hard sound.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(1)
        sound.setframerate(4000)
        sound.writeframes(b"\x80" * 40_000)
    pages.write_cell_page(tmp_path, make_results(evil, scores), transcripts, {"hard": "hard%20sound.wav"})
    page = check_page(tmp_path / "report.html")
    assert "heard" not in page.scripts and evil in page.text  # without the script there is the table all the same
    out = browse(tmp_path / "report.html", SELF_CHECK)
    # 1.0, 0.9, 0.1: as text, 100.0 would come before 10.0 and 90.0 after both
    assert out["worst"][:3] == ["ninth", "hard", "tenth"] and out["best"][-3:] == ["tenth", "hard", "ninth"]
    assert out["names"] == sorted(texts)
    assert out["byId"] == ["plain"] and out["bySaid"] == ["hard"] and out["byHeard"] == ["hard"]
    assert out["byNothing"] == [] and out["count"] == "0 of 5" and out["all"] == 5
    assert out["open"] and out["closed"]
    assert out["texts"] == [["two"], ["six", "six"], ["zzz four"], ["one", "three", "five six"]]
    assert out["titles"] == ["0:00.8", "0:01.8", "0:02.8", "0:03.3"]
    assert (out["next"], out["last"]) == ("error 1 of 4, at 0:00.8", "error 3 of 4, at 0:02.8")
    assert out["current"] == 1
    assert out["list"][1] == "0:01.8 four \u2192 zzz"
    assert out["preload"] == "none" and out["beforePlaying"] == 0
    assert out["playedFrom"] == pytest.approx(0.8) and out["duration"] == 10 and out["playingAt"] > 0.8
    assert out["scripts"] == 0 and out["policy"] == "kept"
