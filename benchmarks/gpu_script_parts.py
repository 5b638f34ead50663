"""Parts of `benchmarks.gpu_check` that run scripts: training, stops, DDP and FSDP2, loader, evaluation.

Datasets are random log-mel: neither a network nor recordings are needed. Scripts run in the process of the part.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import statistics
import time
import traceback
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.gpu_parts import ROOT, Check, Profile, Skipped
from bestrq.model.presets import PRESETS
from common.config import parse
from common.segments import Segments, to_device

# ---- Scripts ----


class StepWatch:
    """Replacement of a script's `seed_step`, the first call of a step: acts at given steps.

    Waits are counted by `torch.cuda.set_sync_debug_mode`, which names operators that wait for the device, in the steps
    `waits`; the steps `profiled` are profiled.
    """

    def __init__(self, check: Check, waits: range, profiled: range) -> None:
        self.check, self.waits, self.profiled = check, waits, profiled
        self.places: Counter[str] = Counter()
        self.profile: dict[str, Any] = {}
        self._counting = contextlib.ExitStack()
        self._profile: Profile | None = None

    def __call__(self, *_: Any, step: int) -> None:
        if step == self.waits.start and self.check.device.type == "cuda":
            self._counting.enter_context(warnings.catch_warnings())
            warnings.simplefilter("always")
            warnings.showwarning = self._note  # type: ignore[assignment]
            torch.cuda.set_sync_debug_mode("warn")
            self._counting.callback(torch.cuda.set_sync_debug_mode, "default")
        elif step == self.waits.stop:
            self._counting.close()
        if step == self.profiled.start:
            self._profile = Profile(self.check)
        elif step == self.profiled.stop and self._profile is not None:
            self.profile = self._profile.stop(len(self.profiled))

    def _note(self, message: Warning | str, *_: Any) -> None:
        if "synchroniz" in str(message):
            self.places[own_place(traceback.extract_stack()[:-1])] += 1


def own_place(stack: list[traceback.FrameSummary]) -> str:
    """Innermost frame of the project's code, as `file:line function`; empty in a thread without one."""
    for frame in reversed(stack):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.lineno} {frame.name}"
    return ""


def run_script(script: str, arguments: list[str], at_step: Callable[..., None]) -> list[dict[str, Any]]:
    """Run a training script in this process; return the lines of its metrics. `at_step(step=N)` starts every step."""
    module: Any = importlib.import_module(script)
    config = parse(module.Config, arguments)
    seed_step = module.seed_step

    def start(seed: int, step: int, rank: int) -> None:
        at_step(step=step)
        seed_step(seed, step, rank)

    with mock.patch.object(module, "seed_step", start):
        module.train(config)
    lines = (Path(config.run.folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "train"]


def arguments(check: Check, recipe: str, folder: str, steps: int) -> list[str]:
    """Command line of a run with a recipe of configs/, at its widths, or tiny."""
    from tests.tiny import DATA, ENCODER

    chosen = [*ENCODER, *DATA, "--data.num_workers=0"] if check.tiny else [f"--config=configs/{recipe}.yaml"]
    names = [f"--run.folder={check.work / folder}", f"--run.steps={steps}", f"--distributed.device={check.device.type}"]
    return [*chosen, *names, "--checkpoint.every_steps=100000"]


def pretraining(check: Check) -> None:
    """pretrain.py with base-120m and 4 and 32 rows: speed, waits of 3 steps, profile of 3 steps."""
    from tests.made_datasets import make_dataset

    lengths = np.random.default_rng(0).integers(600, 2400, size=20 if check.tiny else 300)  # 6 to 24 s
    make_dataset(check.work / "noise", [int(length) for length in lengths], 50_000_000)
    steps, log_every = (12, 2) if check.tiny else (60, 10)
    first, span = (7, 2) if check.tiny else (41, 4)  # no step of either is logged
    for rows in (4,) if check.tiny else (4, 32):
        with check.measurement(f"{rows} rows"):
            watch = StepWatch(check, range(first, first + span - 1), range(first + span, first + span + 3))
            run = arguments(check, "base-120m", f"pretrain-{rows}", steps)
            run += [f"--data.dataset={check.work / 'noise'}", f"--data.rows={rows}", f"--run.log_every={log_every}"]
            lines = run_script("pretrain", [*run, "--validation.every_steps=100000"], watch)
            names = ("step_seconds", "audio_seconds_per_second", "mfu", "data_wait", "memory_gib")
            steady = [line for line in lines if log_every < line["step"] < first]
            figures = {n: statistics.median(line[n] for line in steady) for n in names if n in steady[0]}
            waits: dict[str, Any] = {}
            if check.device.type == "cuda":
                waits["waits_per_step"] = sum(watch.places.values()) / len(watch.waits)
                waits["places_of_waits"] = dict(watch.places)
            check.record(**{f"{rows} rows": figures | waits | {"loss": lines[-1]["loss"], "profile": watch.profile}})


def finetuning(check: Check) -> None:
    """CTC, RNN-T and TDT: 15 steps, and again with a stop after 8 and a resumed run."""
    from tests.tiny import make_dataset

    make_dataset(check.work / "speech", recordings=40 if check.tiny else 200)
    heads = {
        "ctc": ("finetune_ctc", "base-120m-ctc", []),
        "rnnt": ("finetune_rnnt", "base-120m-rnnt", []),
        "tdt": ("finetune_rnnt", "base-120m-rnnt", ["--transducer.durations=[0,1,2]"]),
    }
    steps, stop = (3, 2) if check.tiny else (15, 8)
    for name, (script, recipe, head) in heads.items():
        with check.measurement(name):
            common = [f"--data.dataset={check.work / 'speech'}", "--run.log_every=1", "--validation.max_recordings=1"]
            common += ["--finetune.tokenizer=char", "--finetune.freeze_encoder_steps=0", *head]
            common += [] if check.tiny else ["--data.rows=4", "--encoder.num_layers=4", "--data.row_frames=3000"]
            run = functools.partial(arguments, check, recipe, steps=steps)
            lines = run_script(script, [*run(folder=name), *common], lambda step: None)
            folder = f"{name}-stopped"

            def request(step: int, folder: str = folder) -> None:
                if step == stop:
                    (check.work / folder / "STOP").touch()

            run_script(script, [*run(folder=folder), *common], request)
            again: list[int] = []
            resumed = run_script(script, [*run(folder=folder), *common], lambda step: again.append(step))  # noqa: B023
            expected = {line["step"]: line["loss"] for line in lines}
            if not 1 < again[0] <= steps:
                raise RuntimeError(f"resumed at step {again[0]} after a stop at step {stop}")
            errors = [abs(line["loss"] / expected[line["step"]] - 1) for line in resumed]
            figures = {"loss": lines[-1]["loss"], "stop_requested_at_step": stop, "resumed_at_step": again[0]}
            figures |= {
                "resume_error": max(errors),
                "step_seconds": statistics.median(x["step_seconds"] for x in lines),
            }
            check.record(**{name: figures})


# ---- Several processes, loader, evaluation ----


def parallel(check: Check) -> None:
    """DDP with the sum hook, and FSDP2, in a group of one process: gradients against those without."""
    import torch.distributed as dist

    from bestrq.model.conformer import ConformerEncoder
    from bestrq.training import process
    from bestrq.training.sharding import make_mesh, shard

    cuda = check.device.type == "cuda"
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1,
        device_id=torch.device("cuda", 0) if cuda else None,
    )  # fmt: skip
    settings = process.DistributedSettings(precision="float32")
    plain = ConformerEncoder(replace(PRESETS["quickstart"], dropout=0.0, attention_dropout=0.0)).to(check.device)
    start = torch.zeros(2, 1, dtype=torch.int64)
    layout = plain.layout(Segments(start, start + 400, 400))
    log_mel = torch.randn(2, 400, 80, device=check.device)
    device = torch.device("cuda", 0) if cuda else check.device

    def gradients(model: Any) -> list[torch.Tensor]:
        model(log_mel, layout).square().mean().backward()
        found = [p.grad for p in model.parameters()]
        return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]

    # `parallelise` returns the model of a single process unchanged; DDP itself asks the group for its size.
    wrap = {
        "ddp": lambda model: process.parallelise(model, model.blocks, process.World(size=2, device=device), settings),
        "fsdp": lambda model: shard(model, model.blocks, make_mesh(device, 1, 1), settings.precision, settings.reshard),
    }
    copies = {name: deepcopy(plain) for name in wrap}
    truth = gradients(plain)
    for name, function in wrap.items():
        with check.measurement(name):
            found = gradients(function(copies[name]))
            error = max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(found, truth, strict=True))
            check.record(**{name: {"gradient_error": error}})
    dist.destroy_process_group()


def loader(check: Check) -> None:
    """Rate of batches of 32 rows on the device, and of copies from pinned and pageable memory."""
    from benchmarks import loader_speed

    hours, rows, frames, workers = (0.2, 4, 2000, 0) if check.tiny else (5.0, 32, 6000, 4)
    dataset = loader_speed.write_synthetic(str(check.work / "loader"), hours)
    options = Namespace(row_frames=frames, rows=rows, prefetch=4)
    warm_up, count, seconds, start = 1 if check.tiny else 8, 3 if check.tiny else 60, 0.0, 0.0
    for number, (batch,) in enumerate(loader_speed.loader(dataset, options, workers)):
        log_mel = to_device(batch.log_mel, check.device)
        if number == warm_up:
            check.wait()
            start = time.perf_counter()
        elif number > warm_up:
            seconds += int(batch.segments.length.sum()) / 100
            if number == warm_up + count:
                break
    check.wait()
    check.record(audio_seconds_per_second=seconds / (time.perf_counter() - start), workers=workers)
    if check.device.type == "cuda":
        for name, host in (("pinned", log_mel.cpu().pin_memory()), ("pageable", log_mel.cpu())):
            rate = host.nbytes / check.seconds(lambda host=host: host.to(check.device, non_blocking=True))  # type: ignore[misc]
            check.record(**{f"{name}_gb_per_second": rate / 1e9})


def evaluation(check: Check) -> None:
    """evaluate.py on 20 minutes of log-mel with the export of the part finetuning."""
    from pipelines.recogniser import start_inference
    from tests.tiny import make_dataset

    seconds = 12.0 if check.tiny else 1200.0
    dataset = make_dataset(check.work / "long", recordings=10, long_seconds=seconds)
    evaluate: Any = importlib.import_module("evaluate")
    for head in ("ctc", "rnnt", "tdt"):
        with check.measurement(head):
            export, out = check.work / head / "export", check.work / f"results-{head}"
            if not export.exists():
                raise Skipped("the part finetuning made no export")
            options = [f"--export={export}", f"--data.dataset={dataset}", "--data.split=train", f"--out={out}"]
            config = evaluate.parse_command([*options, f"--device={check.device.type}", "--resamples=100"])
            world = start_inference(config.device, config.threads, config.inference)
            start = time.perf_counter()
            evaluate.evaluate(config, world)
            taken = time.perf_counter() - start
            check.record(**{head: {"seconds": taken, "audio_seconds_per_second": seconds / taken}})
