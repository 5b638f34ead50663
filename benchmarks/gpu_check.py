"""Check of this project on a machine with one GPU, in 8 minutes; docs/gpu.md describes parts and figures.

    bash launch/gpu_check.sh                          # with the Python and torch of the machine, without network
    python -m benchmarks.gpu_check --out gpu.json     # in an environment with requirements-dev.txt

Every part runs in a process of its own with a time limit, so that neither a crash nor a hang ends the others. Results
are written after every part into --out, and as a page with the same name and the suffix .html. The last line is JSON:

    parts        status of every part: ok, failed (a measurement or the process), timeout, skipped
    to_look_at   number of figures outside their limits (`LIMITS`), failed measurements and parts
    mfu, waits_per_step, audio_seconds_per_second    of pretraining, with the most rows that ran

--tiny runs all parts with small sizes, on a CPU too, as the tests do. The exit status is 1 if there is a figure to look
at.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_parts, gpu_script_parts
from benchmarks.gpu_parts import ROOT, Check
from benchmarks.machine import print_figures
from bestrq.report.page import ELEMENTS, Column, Section, paragraph, write_page
from bestrq.training.machine import unusable_gpu
from common.files import read_json, write_json


@dataclass(frozen=True)
class Part:
    """Function of a part, and its limit."""

    run: Callable[[Check], None]
    seconds: int
    """after which its processes are killed, the start of Python included"""


PARTS = {
    "environment": Part(gpu_parts.environment, 20),
    "tests": Part(gpu_parts.tests, 150),
    "losses": Part(gpu_parts.losses, 25),
    "encoders": Part(gpu_parts.encoders, 80),
    "pretraining": Part(gpu_script_parts.pretraining, 90),
    "finetuning": Part(gpu_script_parts.finetuning, 45),
    "parallel": Part(gpu_script_parts.parallel, 20),
    "loader": Part(gpu_script_parts.loader, 20),
    "evaluation": Part(gpu_script_parts.evaluation, 25),
}
"""in the order in which they run; 475 seconds in all"""

TINY_PATIENCE = 20
"""factor of the limits with --tiny: a slow CPU, shared with other tests"""
COMMAND = [sys.executable, "-m", "benchmarks.gpu_check"]
LIMITS: list[tuple[str, float, float, str]] = [
    ("tests.failed", 0, 0, "tests marked cuda fail"),
    ("losses.* exactness.*_error", 0, 1e-4, "a loss in float32 differs from the CPU in float64"),
    ("encoders.*.peak_over_formula", 0.85, 1.15, "peak memory differs from the formula of docs/memory.md"),
    ("pretraining.*.waits_per_step", 0, 1, "the host waits for the device within a step"),
    ("pretraining.*.mfu", 0.4, 1, "MFU below the goal"),
    ("pretraining.*.data_wait", 0, 0.02, "steps wait for the loader"),
    ("finetuning.*.resume_error", 0, 0.01, "a resumed run has other losses than an uninterrupted one"),
    ("parallel.*.gradient_error", 0, 1e-3, "gradients under DDP or FSDP2 differ from those without"),
]
"""pattern of figures, lowest and highest expected value, meaning of a value outside"""


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs (name, value) of nested figures: `pretraining.4 rows.mfu`."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from flatten(inner, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value


def problems(results: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, meaning) of everything to look at, most fundamental first."""
    found = []
    for part, result in results.items():
        if result["status"] == "timeout":
            found.append((part, f"stopped after {result['limit_seconds']} s; figures up to there are kept"))
        elif result["status"] == "failed" and not result["failed"]:
            found.append((part, (result["output"].splitlines() or ["its process ended without output"])[-1]))
        found += [(f"{part}.{name}", error) for name, error in result["failed"].items()]
    for name, value in flatten({part: result["figures"] for part, result in results.items()}):
        for pattern, low, high, meaning in LIMITS:
            if fnmatchcase(name, pattern) and not low <= value <= high:  # NaN is a problem too
                found.append((name, f"{meaning}: {value:.4g}, expected {low:g} to {high:g}"))
    return found


def run_part(name: str, work: Path, tiny: bool) -> dict[str, Any]:
    """Run a part in a new process; return its results, with those up to a crash or the time limit."""
    out, log = work / f"{name}.json", work / f"{name}.log"
    command = [*COMMAND, "--run-part", name, "--out", str(out), "--work", str(work), *(["--tiny"] if tiny else [])]
    start, status = time.perf_counter(), "timeout"
    limit = PARTS[name].seconds * (TINY_PATIENCE if tiny else 1)
    with open(log, "wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = "ok" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            print(f"{name}: stopped after {limit} s", flush=True)
        finally:  # also after Ctrl-C, and for processes that the part left
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.perf_counter() - start
    results = read_json(out) if out.exists() else {"figures": {}, "failed": {}, "skipped": {}}
    if status == "ok" and results["failed"]:
        status = "failed"
    elif status == "ok" and results["skipped"] and not results["figures"]:
        status = "skipped"
    tail = log.read_text(encoding="utf-8", errors="replace")[-4000:] if status in ("failed", "timeout") else ""
    return {"status": status, "seconds": round(seconds, 1), "limit_seconds": limit, **results, "output": tail}


def write_report(path: Path, results: dict[str, Any]) -> None:
    """Write the page: figures to look at, then those of every part."""
    figures = results.get("environment", {}).get("figures", {})
    cards = {"GPU": str(figures.get("gpu", "none")), "torch": str(figures.get("torch", "")), **_headline(results)}
    two = [Column("", "left"), Column("", "wrap")]
    looked = problems(results)
    body = ELEMENTS.table(two, looked) if looked else paragraph("Nothing: all figures are within their limits.")
    sections = [Section("To look at", body)]
    for name, result in results.items():
        rows = [
            (key, f"{value:.4g}" if isinstance(value, float) else str(value))
            for key, value in flatten(result["figures"])
        ]
        rows += [(f"{key}: skipped", reason) for key, reason in result["skipped"].items()]
        rows += [("output", result["output"])] if result["output"] else []
        sections.append(Section(f"{name}: {result['status']}, {result['seconds']} s", ELEMENTS.table(two, rows)))
    write_page(path, "GPU check", "Limits and figures are described in docs/gpu.md.", cards, sections)


def _headline(results: dict[str, Any]) -> dict[str, str]:
    """Main figures of pretraining with the most rows that ran, as text."""
    runs = list(results.get("pretraining", {}).get("figures", {}).values())
    names = ("mfu", "waits_per_step", "audio_seconds_per_second")
    return {name: f"{runs[-1][name]:.4g}" for name in names if runs and name in runs[-1]}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="results; the page is beside it")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--tiny", action="store_true", help="small sizes, also on a CPU")
    parser.add_argument("--work", type=Path, help="folder for datasets and runs (default: temporary, removed)")
    parser.add_argument("--run-part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.tiny and not torch.cuda.is_available():
        parser.error(f"torch finds no GPU: {unusable_gpu() or 'this machine has none; --tiny runs on a CPU'}")
    if not args.run_part and args.work and args.work.exists() and any(args.work.iterdir()):
        parser.error(f"--work {args.work} is not empty: runs in it would be continued; give a new folder")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.run_part:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        PARTS[args.run_part].run(Check(args.out, args.work, device, args.tiny))
        return 0
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        for name in args.parts:
            results[name] = run_part(name, work, args.tiny)
            write_json(args.out, results)
            write_report(args.out.with_suffix(".html"), results)
            print(f"{name}: {results[name]['status']}, {results[name]['seconds']} s", flush=True)
    looked = problems(results)
    for name, meaning in looked:
        print(f"  {name}: {meaning}")
    statuses = {name: result["status"] for name, result in results.items()}
    print_figures({"parts": statuses, "to_look_at": len(looked), **_headline(results)}, "bfloat16")
    return 1 if looked else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the part's processes too
    sys.exit(main())
