"""Parts of `benchmarks.gpu_check` below the scripts: environment, tests, losses, encoders; records and profiles.

A part runs in a process of its own and records figures as it goes. Newer parts of the project and of torch are imported
where they are used, so that a missing feature ends one measurement only.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from bestrq.model.presets import PRESETS
from bestrq.training.flops import gpu_peak
from bestrq.training.machine import driver_version, missing_compiler
from common.files import write_json
from common.segments import Segments

ROOT = Path(__file__).parents[1]
ENCODERS = ("base-120m", "fast-115m", "large-600m")
VARIANTS: list[dict[str, Any]] = [
    {**backend, **compiled}
    for compiled in ({}, {"compile": True})
    for backend in ({"backend": "sdpa"}, {"backend": "flex"}, {"backend": "varlen"})
]
"""changed fields of `EncoderSettings`; those that it lacks are reported as skipped"""
WAITING = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")


class Skipped(Exception):
    """Reason for which this machine, torch or version cannot run a measurement."""


@dataclass
class Check:
    """Machine, folder and results of a part."""

    out: Path
    """JSON file of the results, rewritten after every measurement"""
    work: Path
    """folder shared by the parts of a check"""
    device: torch.device
    tiny: bool
    """sizes of seconds on a CPU, for tests"""
    results: dict[str, dict[str, Any]] = field(default_factory=lambda: {"figures": {}, "failed": {}, "skipped": {}})

    def record(self, **figures: Any) -> None:
        """Add figures and write the file."""
        self.results["figures"] |= figures
        write_json(self.out, self.results)

    @contextlib.contextmanager
    def measurement(self, name: str) -> Iterator[None]:
        """Block whose error or reason to skip is recorded, after which the part continues."""
        with contextlib.ExitStack() as stack:
            stack.push(functools.partial(self._note, name))
            yield

    def _note(self, name: str, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if kind is None or not issubclass(kind, Exception):
            return False
        traceback.print_exception(error)
        group = "skipped" if issubclass(kind, Skipped) else "failed"
        self.results[group][name] = str(error) if group == "skipped" else f"{kind.__name__}: {error}"[:1000]
        self.record()
        return True

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], Any], repeats: int = 5) -> float:
        """Median time of a call on the device, after a first call, which may compile."""
        function()
        times = []
        for _ in range(1 if self.tiny else repeats):
            self.wait()
            start = time.perf_counter()
            function()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)


# ---- Environment ----


def environment(check: Check) -> None:
    """Versions, compiler, rates of products and of memory."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torch_cuda": torch.version.cuda}
    check.record(
        **versions, driver=driver_version(), cudnn=torch.backends.cudnn.version(), triton=_version("triton"),
        compiler=missing_compiler() or "found", torchaudio=_version("torchaudio"),
        apex=_version("apex") or "not installed", cpus=len(os.sched_getaffinity(0)),
        OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS"),
    )  # fmt: skip
    if check.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        check.record(gpu=gpu.name, capability=f"{gpu.major}.{gpu.minor}", gpu_gib=round(gpu.total_memory / 2**30, 1))
        check.record(nccl=".".join(map(str, torch.cuda.nccl.version())), table_tflops=(gpu_peak(gpu.name) or 0) / 1e12)
    size = 256 if check.tiny else 8192
    left, right = (torch.randn(size, size, device=check.device).bfloat16() for _ in range(2))
    rate = 2 * size**3 / check.seconds(lambda: left @ right, 20)
    source = torch.zeros(2**20 if check.tiny else 2**32, dtype=torch.uint8, device=check.device)
    target = torch.empty_like(source)
    moved = 2 * len(source) / check.seconds(lambda: target.copy_(source), 20)
    check.record(bfloat16_tflops=rate / 1e12, memory_gb_per_second=moved / 1e9)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- Tests ----


def tests(check: Check) -> None:
    """Tests marked `cuda`, in 8 processes; outcomes are recorded as they come."""
    marked = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in path.read_text("utf-8")]
    files = [str(path.relative_to(ROOT)) for path in marked]
    if check.tiny:
        files = ["tests/model/test_norms.py"]
    processes = ["-n", "1" if check.tiny else "8", "--dist", "worksteal"] if _version("pytest-xdist") else []
    options = ["-v", "-m", "cuda", "-p", "no:cacheprovider", "--tb=short", *processes]
    counts, failures, tail = Counter(passed=0, failed=0, skipped=0), list[str](), list[str]()
    # Each process compiles and computes with two threads; by default they would start one per core.
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), "2")
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *files], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in (raw.decode(errors="replace").rstrip() for raw in process.stdout):
            print(line, flush=True)
            tail = [*tail[-80:], line]
            if outcome := outcome_of_line(line):
                counts[outcome[1]] += 1
                failures += [outcome[0]] if outcome[1] == "failed" else []
                check.record(**counts, failures=failures)
    if process.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {process.returncode}: " + " | ".join(tail[-5:]))
    if failures:
        check.record(output="\n".join(tail))


def outcome_of_line(line: str) -> tuple[str, str] | None:
    """(test, 'passed', 'failed' or 'skipped') of a line of `pytest -v`, with or without xdist; None for others."""
    found = re.match(r"\[gw\d+\] \[ *\d+%\] (\w+) (tests/.+?)\s*$", line)
    outcome, name = (found[1], found[2]) if found else ("", "")
    if not found and (found := re.match(r"(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b.*\[ *\d+%\]$", line)):
        name, outcome = found[1], found[2]
    known = {"PASSED": "passed", "FAILED": "failed", "ERROR": "failed", "SKIPPED": "skipped"}
    return (name, known[outcome]) if outcome in known else None


# ---- Transducer losses ----


def losses(check: Check) -> None:
    """RNN-T and TDT on the device against the CPU in float64, and their time and memory."""
    sizes, vocab_size = ([(20, 5)] * 2, 16) if check.tiny else ([(750, 100)] * 16, 1024)
    for name in ("rnnt", "tdt"):
        with check.measurement(name):
            small = functools.partial(loss_pass, name, [(30, 7), (1, 4), (9, 0), (45, 20)], 16)
            truth = small(torch.device("cpu"), torch.float64)()
            found = small(check.device, torch.float32)()
            errors = [float((a.cpu().double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]
            check.record(**{f"{name} exactness": {"loss_error": errors[0], "gradient_error": max(errors[1:])}})
            for dtype in (torch.float32, torch.bfloat16):
                run = loss_pass(name, sizes, vocab_size, check.device, dtype)
                _reset_peak(check)
                figures = {"milliseconds": 1000 * check.seconds(run, 3), "peak_gb": _peak(check) / 1e9}
                check.record(**{f"{name} {str(dtype).removeprefix('torch.')}": figures})


def loss_pass(
    name: str, sizes: list[tuple[int, int]], vocab_size: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], list[torch.Tensor]]:
    """Function that returns losses and all gradients of segments of (frames, labels); inputs are random and equal for
    all devices and dtypes."""
    from bestrq.recognition.losses.lattices import Lattices
    from bestrq.recognition.losses.tdt import tdt_loss
    from bestrq.recognition.losses.transducer import transducer_loss

    generator, durations, slice_bytes = torch.Generator().manual_seed(0), (0, 1, 2, 3, 4), 2**30
    joint_dim, outputs = 32 if vocab_size < 100 else 512, vocab_size + (len(durations) if name == "tdt" else 0)
    frames, states = sum(frames for frames, _ in sizes), sum(count + 1 for _, count in sizes)
    inputs = [
        (scale * torch.randn(shape, generator=generator)).to(device, dtype).requires_grad_()
        for scale, *shape in ((1, frames, joint_dim), (1, states, joint_dim), (0.1, outputs, joint_dim), (0.1, outputs))
    ]
    labels = [torch.randint(1, vocab_size, (count,), generator=generator).to(device) for _, count in sizes]
    lattices = Lattices([frames for frames, _ in sizes], labels)

    def run() -> list[torch.Tensor]:
        encoded, predicted, weight, bias = inputs
        if name == "tdt":
            result = tdt_loss(encoded, predicted, weight, bias, lattices, durations, slice_bytes)
        else:
            result = transducer_loss(encoded, predicted, weight, bias, lattices, slice_bytes)
        return [result.detach(), *torch.autograd.grad(result.sum(), inputs)]

    return run


def _reset_peak(check: Check) -> None:
    if check.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(check: Check) -> int:
    """Peak bytes of tensors on the GPU; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if check.device.type == "cuda" else 0


# ---- Encoders ----


def encoders(check: Check) -> None:
    """Forward and backward of 4 rows of 4 segments in bfloat16: time, kernels, peak memory against the formula."""
    for changes in VARIANTS:  # the slow compilations last
        for preset in ("quickstart",) if check.tiny else ENCODERS:
            name = " ".join([preset, changes["backend"], *(["compiled"] if "compile" in changes else [])])
            with check.measurement(name):
                check.record(**{name: _encoder(check, preset, changes)})
            if check.device.type == "cuda":
                torch.cuda.empty_cache()


def _encoder(check: Check, preset: str, changes: dict[str, Any]) -> dict[str, Any]:
    from bestrq.model.conformer import ConformerEncoder
    from bestrq.model.settings import EncoderSettings
    from pipelines.memory_formula import Rows, activation_bytes

    known, hints = {entry.name for entry in fields(EncoderSettings)}, get_type_hints(EncoderSettings)
    for name, value in changes.items():
        if name not in known or (get_args(hints[name]) and value not in get_args(hints[name])):
            raise Skipped(f"encoder.{name}={value} is no setting of this version")
    if check.device.type == "cpu" and changes != VARIANTS[0]:
        raise Skipped("a CPU has one backend")
    if (changes["backend"] == "flex" or "compile" in changes) and (problem := missing_compiler()):
        raise Skipped(f"Triton needs a compiler, but {problem}")
    settings = replace(PRESETS[preset], attention_dropout=0.0, **changes)  # flex has no dropout
    frames = 800 if check.tiny else 6000 if settings.stride == 4 else 9000
    frames -= frames % (4 * settings.row_multiple)
    start = torch.arange(0, frames, frames // 4).expand(4, 4)
    segments = Segments(start, torch.full_like(start, frames // 4 - settings.row_gap), frames)
    encoder = ConformerEncoder(settings).to(check.device).train()
    if "compile" in changes:
        from bestrq.model.compilation import compile_blocks

        compile_blocks(encoder.blocks, settings.activation_checkpointing)
    log_mel = torch.randn(4, frames, settings.num_mels, device=check.device)

    def step() -> None:
        encoder.zero_grad(set_to_none=False)
        with torch.autocast(check.device.type, torch.bfloat16):
            output = encoder(log_mel, encoder.layout(segments))
        output.float().square().mean().backward()

    step()  # gradients exist, and kernels are compiled
    before = torch.cuda.memory_allocated() if check.device.type == "cuda" else 0
    _reset_peak(check)
    step()
    peak = _peak(check) - before
    dense = changes["backend"] == "sdpa"
    formula = activation_bytes(settings, Rows(4, frames), "none", dense=dense, head_logits=0)
    milliseconds = 1000 * check.seconds(step)
    profile = Profile(check)
    step()
    figures = {"milliseconds": milliseconds, "kernels": profile.stop()["kernels"], "formula_gb": formula / 1e9}
    return figures | ({"peak_gb": peak / 1e9, "peak_over_formula": peak / formula} if peak else {})


class Profile:
    """Kernels between the construction and `stop`."""

    def __init__(self, check: Check) -> None:
        self.check = check
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if check.device.type == "cuda" else []
        self.profiler = torch.profiler.profile(activities=kinds)
        check.wait()
        self.profiler.start()
        self.begin = time.perf_counter()

    def stop(self, steps: int = 1) -> dict[str, Any]:
        """Figures per step: kernels, share of the time in which the GPU works, host waits, longest operations."""
        self.check.wait()
        seconds = time.perf_counter() - self.begin
        self.profiler.stop()
        gpu = self.check.device.type == "cuda"
        averages = self.profiler.key_averages()
        annotations = {e.key for e in averages if getattr(e, "is_user_annotation", False)}  # ranges, not kernels
        kernels = [e for e in averages if not gpu or (e.device_type.name == "CUDA" and e.key not in annotations)]
        times = {e.key: (e.self_device_time_total if gpu else e.self_cpu_time_total) / 1000 / steps for e in kernels}
        waits = {e.key: e.count / steps for e in averages if e.key in WAITING}
        longest = sorted(times, key=lambda name: -times[name])[:20]
        return {
            "milliseconds": 1000 * seconds / steps, "kernels": sum(e.count for e in kernels) / steps,
            "busy_share": sum(times.values()) * steps / 1000 / seconds, "calls_that_wait": waits,
            "longest_milliseconds": {name[:100]: round(times[name], 3) for name in longest},
        }  # fmt: skip
