"""Comparison of training runs: positions, averages and settings; the page is safe and works in a real browser."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bestrq.report import run_curves
from bestrq.report.curves_page import CURVES_SCRIPT
from bestrq.report.run_curves import RunRecord, best_value, curves_of, differing_settings, last_values, restarts_of
from bestrq.training.metrics_file import totals_of
from common.config import save_yaml
from common.errors import UserError
from tests.report.test_pages import BROWSER, browse
from tests.report.test_report import HOSTILE, Page, check_page
from tools import plot

TRAIN = {"run": {"steps": 8, "folder": "a", "seed": 0}, "optimizer": {"learning_rate": 1e-3}}


def train_row(step: int, loss: Any, start: int = 1, **more: Any) -> dict[str, Any]:
    """Line of a run that hears 36 s of audio and takes 20 s per step, with 100 s between its starts."""
    totals = {"audio_hours": step / 100, "run_seconds": step * 20.0 + 100 * (start - 1), "starts": start}
    return {"step": step, "kind": "train", "loss": loss, **totals, **more}


def write_run(
    folder: Path, rows: Sequence[Mapping[str, Any]] | None, settings: Mapping[str, Any] | None = None, starts: int = 1
) -> None:
    folder.mkdir(parents=True)
    if rows is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if settings is not None:
        save_yaml(dict(settings), folder / "config.yaml")
    (folder / "run.json").write_text(json.dumps({"starts": [{}] * starts}))


def record(rows: list[dict[str, Any]], name: str = "a", settings: Mapping[str, Any] | None = None) -> RunRecord:
    return RunRecord(name, rows, totals_of(rows), settings or {})


def test_validations_get_the_hours_and_seconds_of_their_step() -> None:
    rows = [
        train_row(2, 3.0),
        train_row(4, 3.0),
        {"step": 6, "kind": "dev", "dev_wer": 0.5},
        train_row(8, 2.0, start=2),
    ]
    rows.append({"step": 9, "kind": "dev", "dev_wer": 0.25})  # after the last line with totals
    dev = curves_of(record(rows), 100)["dev"]
    assert dev.step.tolist() == [6, 9] and dev.hours is not None and dev.seconds is not None
    assert dev.hours.tolist() == pytest.approx([0.06, 0.08])
    assert dev.seconds.tolist() == pytest.approx([(80 + 260) / 2, 260])
    assert restarts_of(record(rows)) == [(4, 0.04, 80.0)]


def test_old_files_have_curves_by_step_and_by_their_rates() -> None:
    rates = {"audio_seconds_per_second": 36.0, "step_seconds": 2.0}
    old = [{"step": 10, "kind": "train", "loss": 1.0} | rates, {"step": 20, "kind": "train", "loss": 2.0} | rates]
    curve = curves_of(record(old), 100)["train"]
    assert curve.hours is not None and curve.seconds is not None
    assert curve.seconds.tolist() == [20, 40] and curve.hours.tolist() == pytest.approx([0.2, 0.4])
    without = curves_of(record([{"step": 10, "kind": "train", "loss": 1.0}]), 100)["train"]
    assert without.hours is None and without.seconds is None and without.lines["loss"].mean.tolist() == [1.0]


def test_a_long_record_is_averaged_in_groups_whose_range_is_kept() -> None:
    """Against plain loops. A spike of one line stays in the range; groups without a finite number are gaps."""
    rng = np.random.default_rng(0)
    losses: list[Any] = rng.normal(size=1003).tolist()
    losses[500] = 99.0
    losses[20:60] = [None] * 40
    curve = curves_of(record([train_row(i + 1, loss) for i, loss in enumerate(losses)]), 100)["train"]
    line = curve.lines["loss"]
    assert len(line.mean) == 100 and np.nanmax(line.high) == 99.0 and np.isnan(line.mean).sum() == 4
    edges = [int(edge) for edge in np.linspace(0, 1003, 100, endpoint=False)] + [1003]
    for i, (start, stop) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        group = [loss for loss in losses[start:stop] if loss is not None]
        assert curve.step[i] == pytest.approx((start + 1 + stop) / 2)
        if group:
            assert line.mean[i] == pytest.approx(math.fsum(group) / len(group))
            assert (line.low[i], line.high[i]) == (min(group), max(group))
        else:
            assert math.isnan(line.mean[i]) and math.isnan(line.low[i])


def test_every_number_of_a_line_is_a_metric() -> None:
    row = {"step": 1, "kind": "train", "a": 1, "spike": True, "usage": [0.5, 0.25], "bad": None, "text": "x"}
    row |= {"large": 10**400, "long": [1.0] * 17, "mixed": [1, "x"], "deep": {"a": 1}}
    numbers = run_curves.numbers_of(row)
    assert {name: value for name, value in numbers.items() if math.isfinite(value)} == {
        "a": 1.0, "spike": 1.0, "usage[0]": 0.5, "usage[1]": 0.25, "mixed[0]": 1.0}  # fmt: skip
    assert set(numbers) - {"a", "spike", "usage[0]", "usage[1]", "mixed[0]"} == {"bad", "large"}


def test_last_and_best_values() -> None:
    rows = [
        {"step": step, "kind": "dev", "dev_wer": wer, "dev_accuracy": wer}
        for step, wer in ((1, 0.5), (2, 0.3), (3, 0.4))
    ]
    rows.append({"step": 4, "kind": "dev", "dev_wer": None})
    assert last_values(record(rows), "dev") == {"dev_wer": (3, 0.4), "dev_accuracy": (3, 0.4)}
    assert best_value(record(rows), "dev", "dev_wer") == (2, 0.3)
    assert best_value(record(rows), "dev", "dev_accuracy") == (1, 0.5)


def test_settings_differ_among_the_runs_that_have_them() -> None:
    first = {"run": {"folder": "a", "steps": 5}, "quantizer": {"seed": 0}, "list": [1, 2]}
    second = {"run": {"folder": "b", "steps": 6}, "finetune": {"init": "x"}, "list": [1, 2]}
    third = {"run": {"folder": "c", "steps": 5}, "finetune": {"init": "<b>"}, "list": [1, 2]}
    assert differing_settings([first, second, third]) == {
        "run.steps": ["5", "6", "5"], "finetune.init": [None, "x", "<b>"]}  # fmt: skip
    assert differing_settings([first]) == {} and differing_settings([]) == {}
    kinds = [record([], settings=values).script for values in (first, second, second | {"transducer": {}}, {})]
    assert kinds == ["pretraining", "CTC", "RNN-T", ""]


def test_runs_of_all_kinds_unfinished_and_empty_ones_are_on_one_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    write_run(runs / "pre", [train_row(4, 3.0), train_row(8, 2.0)], TRAIN | {"quantizer": {"seed": 1}})
    rows = [train_row(4, 9.0), {"step": 2, "kind": "dev", "dev_wer": 0.4}, {"step": 4, "kind": "dev", "dev_wer": 0.5}]
    write_run(runs / "ctc/seed-1", rows, TRAIN | {"finetune": {"init": ""}}, starts=3)
    write_run(runs / "empty", [], TRAIN | {"finetune": {}, "transducer": {}})
    write_run(runs / "started", None)
    (runs / "pre/checkpoints/step-00000004").mkdir(parents=True)
    (runs / "pre/checkpoints/step-00000004/run.json").touch()  # not a run
    (runs / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    plot.main([*(f"runs/{name}" for name in sorted(os.listdir(runs))), "--out", "out/plot.html"])
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()[:-1]] == ["ctc/seed-1", "empty", "pre", "started"]
    assert "no run in runs/notes.txt" in printed.err
    page = check_page(tmp_path / "out/plot.html")
    data = json.loads(page.scripts[: page.scripts.index('"use strict"')])
    charts = {chart["title"]: [line["run"] for line in chart["lines"]] for chart in data["charts"]}
    assert charts["train/loss (CTC)"] == [0] and charts["train/loss (pretraining)"] == [2]
    assert charts["dev/dev_wer"] == [0] and charts["train/starts"] == [0, 2]
    for text in ("step 4 of 8", "finished", "empty", "0.5 (best 0.4 at 2)"):
        assert text in page.text
    assert "quantizer.seed" not in page.text  # only one run has it
    plot.main(["runs", "--out", "out/plot.html", "--names", "one", "two", "three", "four"])
    assert "three" in check_page(tmp_path / "out/plot.html").text
    plot.main(["runs/pre", "--out", "out/one.html"])
    assert "pre" in check_page(tmp_path / "out/one.html").text
    with pytest.raises(UserError, match="no run folder at any depth"):
        plot.main(["runs/notes.txt"])
    with pytest.raises(UserError, match="runs is missing"):
        plot.main([])


def hostile_runs(runs: Path) -> None:
    settings = TRAIN | {"finetune": {"init": HOSTILE}, HOSTILE: {HOSTILE: HOSTILE}}
    rows: list[dict[str, Any]] = [
        train_row(1, 1e308, **{HOSTILE: 1.0, "__proto__": 2.0, "constructor": 1, "</script><b id=evil>": 3}),
        train_row(2, -1e308, **{HOSTILE: 10**400, "usage": [1, "x"]}),
        {"step": 3, "kind": "</script><b id=evil>", "__proto__": 1},
        {"step": 10**30, "kind": "train", "loss": 1.0}, {"step": -4, "kind": "train", "loss": 1.0},
        {"step": 4, "kind": 7, "loss": 1.0}, {"step": True, "kind": "train", "loss": 5.0},
        {"step": 5, "kind": "train", "loss": 1.0, "audio_hours": "x", "run_seconds": [1], "starts": 1e400},
        {"step": 6, "kind": "train", "loss": 1.0, "audio_hours": -5, "run_seconds": 1e300, "starts": -1},
    ]  # fmt: skip
    write_run(runs / "<b id=evil>&\"'", rows, settings)
    with open(runs / "<b id=evil>&\"'" / "metrics.jsonl", "a") as stream:
        stream.write('{"step": NaN}\n{"step": 7, "kind": "train", "loss": Infinity}\n' + "[" * 100_000 + "\n\0\n")
    write_run(runs / "deep", [train_row(1, 1.0)], TRAIN | {"finetune": {"init": "y"}})
    (runs / "deep/config.yaml").write_text("a: " + "[" * 3000)
    write_run(runs / "odd", [train_row(1, 1.0)], {"run": 7, "finetune": "z"})
    (runs / "odd/run.json").write_text('{"starts": 7}')
    (runs / "pipe").mkdir()
    os.mkfifo(runs / "pipe/metrics.jsonl")
    (runs / "pipe/run.json").write_text("[")


def test_hostile_files_are_escaped_or_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile_runs(tmp_path / "runs")
    out = tmp_path / "plot.html"
    plot.main([str(tmp_path / "runs"), "--out", str(out), "--title", HOSTILE])
    page = check_page(out)
    assert not any(attributes.get("id") == "evil" for _, attributes in page.tags)
    data = json.loads(page.scripts[: page.scripts.index('"use strict"')])
    assert data["runs"][0]["name"] == "<b id=evil>&\"'" and CURVES_SCRIPT in page.scripts
    for text in (
        "pipe: metrics.jsonl:",
        "metrics.jsonl: not a regular file",
        "pipe: run.json:",
        "deep: config.yaml:",
        HOSTILE,
    ):
        assert text in page.text
    capsys.readouterr()


CHECK = """
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const all = (selector, parent = document) => [...parent.querySelectorAll(selector)];
const texts = (elements) => elements.map((element) => element.textContent);
const loss = () => all(".curves figure").find((box) => box.querySelector("h3").textContent === "train/loss");
const paths = (kind) => all("path." + kind, loss()).map((path) => path.getAttribute("d"));
const labels = () => texts(all("svg text", loss()));
const isBad = (element) => [...element.attributes].some((attribute) => /NaN|Infinity/.test(attribute.value));
async function until(condition) {
  for (let k = 0; k < 500 && !condition(); k++) {
    for (let spent = 0; spent < 2e6; spent++); // frames are drawn in real time, and time here is virtual
    await wait(20);
  }
}
async function redrawn(act) {
  const before = loss().querySelector("svg");
  act();
  await until(() => loss().querySelector("svg") !== before);
}
const press = (text) => redrawn(() => all(".tools button").find((button) => button.textContent === text).click());
const set = (element, event, value) => redrawn(() => {
  if (typeof value === "boolean") element.checked = value; else element.value = value;
  element.dispatchEvent(new Event(event));
});
(async () => {
  const out = {};
  const [axis, weight, log, search] = all(".curves .tools select, .curves .tools input");
  await until(() => all(".curves svg path.line").length);
  out.charts = texts(all(".curves figure h3"));
  out.closed = texts(all("details.kind:not([open]) > summary"));
  out.evil = all("#evil").length;
  out.drawn = all(".curves svg path.line").length;
  if (all(".legend input").length === 3) {
    out.steps = paths("line");
    out.unit = labels().at(-1);
    out.restarts = texts(all("circle.restart title", loss()));
    out.restartAt = all("circle.restart", loss()).map((dot) => Number(dot.getAttribute("cx")));
    await set(axis, "change", "seconds");
    out.seconds = paths("line");
    out.secondsUnit = labels().at(-1);
    out.missing = document.querySelector(".curves .note").textContent;
    await set(axis, "change", "hours");
    out.hours = paths("line").length;
    await set(axis, "change", "step");
    await set(weight, "input", 0.5);
    out.smooth = paths("line")[0];
    out.raw = paths("raw")[0];
    await set(weight, "input", 0);
    await set(log, "change", true);
    out.logarithmic = labels();
    await set(log, "change", false);
    const svg = loss().querySelector("svg");
    const place = svg.getBoundingClientRect();
    const at = { clientX: place.left + place.width * 0.99, clientY: place.top + 9 };
    svg.dispatchEvent(new PointerEvent("pointermove", at));
    out.values = texts(all(".values div", loss()));
    await redrawn(() => all(".legend input")[1].click());
    out.without = paths("line").length;
    await press("no runs");
    out.none = labels();
    await press("all runs");
    out.all = paths("line").length;
    search.value = "LOSS";
    search.dispatchEvent(new Event("input"));
    out.found = texts(all(".curves figure:not([hidden]) h3"));
    const head = all(".runs th").find((cell) => cell.textContent === "optimizer.learning_rate");
    out.settings = all(".runs tbody tr").map((row) => row.cells[head.cellIndex].textContent);
  }
  out.bad = all("svg *").filter(isBad).length;
  out.policy = document.documentElement.dataset.policy || "kept";
  const outcome = document.createElement("pre");
  outcome.id = "outcome";
  outcome.textContent = JSON.stringify(out);
  document.body.append(outcome);
})();
"""


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (part.split() for part in path.replace("M", "L").split("L")[1:])]


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed to open the page with")
def test_axes_smoothing_restarts_and_values_work_in_a_browser(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    first = [train_row(step, 8.0 / step, start=1 + (step > 4)) for step in (1, 2, 4, 6, 8)]
    first += [{"step": 8, "kind": "dev", "dev_wer": 0.5}, {"step": 8, "kind": "norms", "gradient/encoder": 1.0}]
    write_run(runs / "first", first, TRAIN, starts=2)
    changed = TRAIN | {"optimizer": {"learning_rate": 2e-3}}
    write_run(runs / "second", [train_row(step, 4.0) for step in (1, 2, 4)], changed)
    write_run(runs / "third", [{"step": 8, "kind": "train", "loss": 5.0}], TRAIN)
    plot.main([str(runs), "--out", str(tmp_path / "plot.html")])
    out = browse(tmp_path / "plot.html", CHECK)
    assert out["charts"][:2] == ["train/loss", "train/audio_hours"] and out["charts"][-1] == "norms/gradient/encoder"
    assert out["closed"] == ["norms"]
    x = [x for x, _ in points(out["steps"][0])]
    y = np.array([y for _, y in points(out["steps"][0])])
    assert np.diff(x) / (x[-1] - x[0]) == pytest.approx([1 / 7, 2 / 7, 2 / 7, 2 / 7], abs=1e-3)
    assert (y[0] - y) / (y[0] - y[-1]) == pytest.approx([0, 4 / 7, 6 / 7, (8 - 8 / 6) / 7, 1], abs=1e-2)
    assert out["unit"] == "optimizer steps" and len(out["steps"]) == 3
    assert out["restarts"] == ["first: restart after step 4"] and out["restartAt"] == pytest.approx([x[2]], abs=0.1)
    seconds = np.array([x for x, _ in points(out["seconds"][0])])
    expected = np.array([20, 40, 80, 220, 260])
    shares = (seconds - seconds[0]) / (seconds[-1] - seconds[0])
    assert shares == pytest.approx((expected - 20) / 240, abs=1e-3)
    assert len(out["seconds"]) == out["hours"] == 2 and "third" in out["missing"]  # without a record of time
    assert out["secondsUnit"] == "run time, minutes"
    ema = [8.0, (0.25 * 8 + 0.5 * 4) / 0.75, (0.125 * 8 + 0.25 * 4 + 0.5 * 2) / 0.875]
    smooth, raw = points(out["smooth"]), points(out["raw"])
    per_nat = (raw[1][1] - raw[0][1]) / 4
    assert [(y - raw[0][1]) / per_nat for _, y in smooth[:3]] == pytest.approx([8 - value for value in ema], abs=0.02)
    assert "1" in out["logarithmic"]
    assert [value.replace("\xa0", " ") for value in out["values"]] == ["5 at 8 third", "4 at 4 second", "1 at 8 first"]
    assert (out["without"], out["none"], out["all"]) == (2, ["no values"], 3)
    assert out["found"] == ["train/loss"] and out["evil"] == 0 and out["bad"] == 0 and out["policy"] == "kept"
    assert out["settings"] == ["0.001", "0.002", "0.001"]


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed to open the page with")
def test_hostile_runs_are_drawn_in_a_browser(tmp_path: Path) -> None:
    hostile_runs(tmp_path / "runs")
    plot.main([str(tmp_path / "runs"), "--out", str(tmp_path / "plot.html")])
    out = browse(tmp_path / "plot.html", CHECK)
    assert out["evil"] == 0 and out["bad"] == 0 and out["drawn"] >= 5 and out["policy"] == "kept"


def test_the_page_is_a_whole_document(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/a", [train_row(1, 1.0)], TRAIN)
    plot.main([str(tmp_path / "runs"), "--out", str(tmp_path / "plot.html")])
    assert Page((tmp_path / "plot.html").read_text()).open == []
