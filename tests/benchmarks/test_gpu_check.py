"""benchmarks.gpu_check: every part runs in a tiny form on a CPU; a crash, a hang and a figure outside its limits are
reported; results are written after every part."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check, gpu_parts
from benchmarks.gpu_parts import Check, Skipped, outcome_of_line
from benchmarks.gpu_script_parts import StepWatch, own_place
from tests.gpu.simulated_cuda import simulated_cuda

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the command itself uses it")


def make_check(folder: Path, name: str = "part", device: str = "cpu") -> Check:
    return Check(folder / f"{name}.json", folder, torch.device(device), tiny=True)


def run(folder: Path, name: str, device: str = "cpu") -> dict[str, Any]:
    """Figures of a part that ran without a failed measurement."""
    check = make_check(folder, name, device)
    gpu_check.PARTS[name].run(check)
    assert check.results["failed"] == {}
    assert json.loads(check.out.read_text()) == json.loads(json.dumps(check.results))
    return dict(check.results["figures"])


def healthy(figures: dict[str, Any], part: str) -> bool:
    """Whether all figures are within their limits."""
    return not gpu_check.problems({part: {"status": "ok", "figures": figures, "failed": {}}})


def test_losses_agree_with_float64(tmp_path: Path) -> None:
    figures = run(tmp_path, "losses")
    assert set(figures) == {
        f"{loss} {case}" for loss in ("rnnt", "tdt") for case in ("exactness", "float32", "bfloat16")
    }
    assert figures["tdt exactness"]["gradient_error"] > 0 and healthy(figures, "losses")


def test_encoders_name_the_variants_that_they_skip(tmp_path: Path) -> None:
    check = make_check(tmp_path)
    gpu_parts.encoders(check)
    figures, skipped = check.results["figures"], check.results["skipped"]
    assert figures["quickstart sdpa"]["kernels"] > 100 and figures["quickstart sdpa"]["formula_gb"] > 0
    assert len(figures) + len(skipped) == len(gpu_parts.VARIANTS) and check.results["failed"] == {}
    assert skipped["quickstart flex"] == "a CPU has one backend"


def test_ddp_and_fsdp_have_the_gradients_of_one_process(tmp_path: Path) -> None:
    figures = run(tmp_path, "parallel")
    assert set(figures) == {"ddp", "fsdp"} and healthy(figures, "parallel")


def test_training_stops_resumes_and_is_evaluated(tmp_path: Path) -> None:
    figures = run(tmp_path, "finetuning")
    assert set(figures) == {"ctc", "rnnt", "tdt"} and healthy(figures, "finetuning")
    assert all(f["resume_error"] == 0 and f["resumed_at_step"] == f["stop_requested_at_step"] for f in figures.values())
    assert all(f["audio_seconds_per_second"] > 0 for f in run(tmp_path, "evaluation").values())


def test_evaluation_without_an_export_is_skipped(tmp_path: Path) -> None:
    check = make_check(tmp_path)
    gpu_check.PARTS["evaluation"].run(check)
    assert check.results["skipped"]["ctc"] == "the part finetuning made no export"


def test_pretraining_is_timed_and_profiled(tmp_path: Path) -> None:
    figures = run(tmp_path, "pretraining")["4 rows"]
    assert figures["step_seconds"] > 0 and figures["profile"]["kernels"] > 100 and "waits_per_step" not in figures
    assert len(figures["profile"]["longest_milliseconds"]) == 20


def test_the_loader_is_measured(tmp_path: Path) -> None:
    assert run(tmp_path, "loader")["audio_seconds_per_second"] > 0


@NO_GPU
def test_the_loader_runs_on_the_simulated_gpu(tmp_path: Path) -> None:
    with simulated_cuda() as gpu:
        figures = run(tmp_path, "loader", "cuda")
    assert gpu.waits and {"pinned_gb_per_second", "pageable_gb_per_second"} < set(figures)


@NO_GPU
def test_no_gpu_is_an_error_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(["--out", str(tmp_path / "gpu.json")])
    assert "torch finds no GPU" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_used_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old").touch()
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(["--tiny", "--work", str(tmp_path)])
    assert "not empty" in capsys.readouterr().err


def test_the_command_writes_results_page_and_json_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    assert gpu_check.main(["--tiny", "--parts", "environment", "tests", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert results["environment"]["figures"]["torch"] == torch.__version__
    assert sum(results["tests"]["figures"][name] for name in ("passed", "failed", "skipped")) == 2
    page = (tmp_path / "gpu.html").read_text()
    assert "bfloat16_tflops" in page and "Nothing: all figures are within their limits." in page
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["parts"] == {"environment": "ok", "tests": "ok"} and last["to_look_at"] == 0 and last["processor"]


FIGURES = '{"figures": {"failed": 3}, "failed": {}, "skipped": {}}'
WRITE = f"import sys, time; open(sys.argv[4], 'w').write('{FIGURES}'); "


@pytest.mark.parametrize(("then", "status"), [("raise OSError('<lost>')", "failed"), ("time.sleep(600)", "timeout")])
def test_a_crash_or_a_hang_keeps_figures_and_ends_no_other_part(
    then: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "COMMAND", [sys.executable, "-c", WRITE + then])
    monkeypatch.setattr(gpu_check, "PARTS", dict.fromkeys(("tests", "loader"), gpu_check.Part(lambda check: None, 1)))
    monkeypatch.setattr(gpu_check, "TINY_PATIENCE", 3)
    assert gpu_check.main(["--tiny", "--out", str(tmp_path / "gpu.json")]) == 1
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: (r["status"], r["figures"]) for name, r in results.items()} == {
        name: (status, {"failed": 3}) for name in ("tests", "loader")
    }
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["to_look_at"] == 3  # two parts, and the failed tests
    page = (tmp_path / "gpu.html").read_text()
    assert "tests marked cuda fail: 3, expected 0 to 0" in page and "<lost>" not in page


def test_figures_outside_their_limits_are_listed() -> None:
    figures = {"4 rows": {"mfu": 0.41, "waits_per_step": 1}, "32 rows": {"mfu": 0.39, "waits_per_step": 2.0}}
    found = gpu_check.problems(
        {"pretraining": {"status": "ok", "figures": figures, "failed": {"64 rows": "no memory"}}}
    )
    assert found == [
        ("pretraining.64 rows", "no memory"),
        ("pretraining.32 rows.mfu", "MFU below the goal: 0.39, expected 0.4 to 1"),
        ("pretraining.32 rows.waits_per_step", "the host waits for the device within a step: 2, expected 0 to 1"),
    ]
    assert not healthy({"ddp": {"gradient_error": float("nan")}}, "parallel")


def test_an_error_ends_one_measurement_only(tmp_path: Path) -> None:
    check = make_check(tmp_path)
    with check.measurement("first"):
        raise ValueError("broken")
    with check.measurement("second"):
        raise Skipped("torch is too old")
    with check.measurement("third"):
        check.record(third=1)
    expected = {
        "figures": {"third": 1},
        "failed": {"first": "ValueError: broken"},
        "skipped": {"second": "torch is too old"},
    }
    assert json.loads(check.out.read_text()) == expected
    with pytest.raises(KeyboardInterrupt), check.measurement("stop"):
        raise KeyboardInterrupt


def test_waits_are_counted_by_place_in_the_chosen_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    watch = StepWatch(make_check(tmp_path, device="cuda"), range(2, 4), range(9, 9))
    for step in range(1, 6):
        watch(step=step)
        if 1 < step < 4:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
    assert modes == ["warn", "default"]
    assert [(count, place.split()[1]) for place, count in watch.places.items()] == [(2, own_function())]


def own_function() -> str:
    return test_waits_are_counted_by_place_in_the_chosen_steps.__name__


def test_the_place_of_a_wait_is_in_the_project() -> None:
    import traceback

    ours = traceback.FrameSummary(str(gpu_parts.ROOT / "pretrain.py"), 7, "train")
    library = traceback.FrameSummary(str(gpu_parts.ROOT / ".venv/lib/site-packages/torch/x.py"), 1, "f")
    assert own_place([ours, library]) == "pretrain.py:7 train"
    assert own_place([library]) == ""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[gw3] [ 12%] PASSED tests/a/test_b.py::test_c[cuda-1] ", ("tests/a/test_b.py::test_c[cuda-1]", "passed")),
        ("[gw0] [100%] FAILED tests/a/test_b.py::test_c[a b]", ("tests/a/test_b.py::test_c[a b]", "failed")),
        (
            "tests/a/test_b.py::test_c SKIPPED (no NVIDIA GPU here)      [100%]",
            ("tests/a/test_b.py::test_c", "skipped"),
        ),
        ("tests/a/test_b.py::test_c ERROR   [ 50%]", ("tests/a/test_b.py::test_c", "failed")),
        ("FAILED tests/a/test_b.py::test_c - assert 0", None),
        ("[gw0] node down: Not properly terminated", None),
    ],
)
def test_outcomes_are_read_from_the_output_of_pytest(line: str, expected: tuple[str, str] | None) -> None:
    assert outcome_of_line(line) == expected
