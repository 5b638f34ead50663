"""Dry run: memory and communication of a rank, counted in a step on fake GPUs, next to the formulas.

Nothing is read but the settings, and nothing is written. docs/memory.md explains the figures.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from bestrq.model.settings import EncoderSettings
from bestrq.training.process import World
from pipelines import memory_formula, pretraining
from pipelines.fake_gpu import efficient_attention, unmasked_attention
from pipelines.fake_world import Collective, Collectives, fake_world
from pipelines.live_bytes import LiveBytes
from pipelines.trial_step import Config, Shape, TrialStep, resolved, shape_of, vocabulary

GPU = torch.device("cuda", 0)
FUSED = ("flex", "varlen")
"""backends of attention that keep no mask of all pairs"""


@dataclass(frozen=True)
class StepCounts:
    """Bytes and collectives of rank 0 in a step after the first one."""

    parameters: int
    gradients: int
    optimizer: int
    peak: int
    """of all tensors, without workspaces inside kernels"""
    collectives: tuple[Collective, ...]

    @property
    def rest(self) -> int:
        """Bytes at the peak besides parameters, gradients and optimizer state: activations and gathered weights."""
        return self.peak - self.parameters - self.gradients - self.optimizer


def count_step(config: Config, shape: Shape, processes: int, shards: int) -> StepCounts:
    """Count the second step: the first one allocates the moments."""
    attention = unmasked_attention if fused(config.encoder) else efficient_attention
    with contextlib.ExitStack() as stack:
        for context in (fake_losses(), fake_world(processes, attention), no_mask(config.encoder)):
            stack.enter_context(context)
        collectives, live = stack.enter_context(Collectives()), stack.enter_context(LiveBytes("cuda"))
        world = World(size=processes, device=GPU)
        step = TrialStep(config, shape, world, shards, replicated=processes > 1 and shards == 1)
        step.run()
        collectives.found.clear()
        live.peak = live.now
        step.run()
        found = step.parameter_bytes, step.gradient_bytes, step.optimizer_bytes
    return StepCounts(*found, live.peak, tuple(collectives.found))


def fused(encoder: EncoderSettings) -> bool:
    """Whether attention keeps no mask; a learned bias of flex is counted with one."""
    return encoder.backend in FUSED and encoder.position != "relative"


@contextlib.contextmanager
def no_mask(encoder: EncoderSettings) -> Iterator[None]:
    """Leave out the mask of all pairs, which the layout makes in place of a fused backend's: fused kernels cannot run
    on fake tensors."""
    if not fused(encoder):
        yield
        return
    with mock.patch("bestrq.model.layout.make_backend_mask", lambda *_: torch.empty(1, 1, 1, 1, device=GPU)):
        yield


class NoLaunch:
    """Kernel of Triton that does nothing."""

    def __getitem__(self, _: Any) -> Any:
        return lambda *_, **__: None


@contextlib.contextmanager
def fake_losses() -> Iterator[None]:
    """Losses of recognition with their kernels for a GPU, whose tensors are allocated, but not computed."""
    kernels = "bestrq.recognition.losses.kernels", "bestrq.recognition.losses.ctc_kernels"
    names = [(kernels[0], name) for name in ("scores_kernel", "posteriors_kernel")]
    names += [(kernels[1], name) for name in ("ctc_scores_kernel", "ctc_posteriors_kernel")]
    with contextlib.ExitStack() as stack:
        for module, name in names:
            stack.enter_context(mock.patch(f"{module}.{name}", NoLaunch()))
        for module in ("transducer", "tdt", "ctc"):
            patch = mock.patch(f"bestrq.recognition.losses.{module}.use_kernels", lambda tensor: tensor.is_cuda)
            stack.enter_context(patch)
        stack.enter_context(mock.patch("torch.cuda.device_of", lambda _: contextlib.nullcontext()))
        # cuDNN's LSTM needs a driver; torch's own keeps more tensors, in a small network.
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


# ---- The same by formula ----


def head_sizes(config: Config) -> tuple[int, float] | None:
    """Outputs of the head, and logits per encoder frame at the loss; None for a model that the formula excludes."""
    if isinstance(config, pretraining.Config):
        codes = config.quantizer.num_codebooks * config.quantizer.codebook_size
        return None if config.targets.extended else (codes, memory_formula.TARGET_SHARE * codes)
    return None if hasattr(config, "transducer") else (vocabulary(config), float(vocabulary(config)))


def formula_bytes(config: Config, shape: Shape, shards: int) -> tuple[float, float] | None:
    """Bytes of weights (with gradients, moments and gathered weights) and of activations by `memory_formula`.

    None for models that it does not describe: transducers, several targets, stages, float32, other subsamplings.
    """
    encoder, sizes = config.encoder, head_sizes(config)
    known = ("cuda", encoder.subsampling, encoder.subsampling_factor) in memory_formula.SUBSAMPLING
    if sizes is None or not known or encoder.earlier_stages or config.distributed.precision != "bfloat16":
        return None
    rows = memory_formula.Rows(shape.rows, shape.row_frames)
    dense = not fused(encoder) and encoder.mask != "window"
    activations = memory_formula.activation_bytes(
        encoder, rows, encoder.activation_checkpointing, shards, dense, sizes[1]
    )
    weights = memory_formula.weight_bytes(encoder, shards, sizes[0])
    if shards > 1:
        blocks = encoder.num_layers * memory_formula.block_weights(encoder)
        weights += 2.0 * blocks * (not config.distributed.reshard)  # all blocks stay gathered, in bfloat16
        weights += 4.0 * blocks * (config.accumulation > 1)  # gradients are whole until the last micro-batch
    return weights, activations


# ---- Report ----


def sent_bytes(collective: Collective) -> float:
    """Bytes that a rank sends in a ring of the group: Patarasuk and Yuan, Bandwidth optimal all-reduce, 2009."""
    share = (collective.ranks - 1) / collective.ranks
    return share * collective.bytes * (2 if collective.kind == "all-reduce" else 1)


def report(config: Config, processes: int, local_size: int) -> dict[str, Any]:
    """Count a step and print its memory and communication; returns the figures as JSON values."""
    config, shards = resolved(config, processes, local_size)
    shape = shape_of(config, processes)
    counts, formula = count_step(config, shape, processes, shards), formula_bytes(config, shape, shards)
    settings = config.distributed
    layout = settings.strategy + (f" in groups of {shards}" if settings.strategy == "hsdp" else "")
    print(
        f"Dry run: {processes} processes, {layout}, {settings.precision}; {shape.rows} x {shape.row_frames:,} mel "
        f"frames per process and micro-batch, accumulation {config.accumulation}\n\n"
        f"{'Memory of a rank at the peak (GB)':<40}{'counted':>10}{'formula':>10}"
    )
    for name, value in memory_lines(counts, formula):
        print(f"{name:<40}{value[0] / 1e9:>10.3f}{'-' if value[1] is None else f'{value[1] / 1e9:.3f}':>10}")
    print(f"\n{'Communication of a rank per step':<32}{'ranks':>8}{'calls':>8}{'GB':>12}{'GB sent':>12}")
    collectives = []
    for (kind, ranks), calls in Counter((c.kind, c.ranks) for c in counts.collectives).items():
        same = [c for c in counts.collectives if (c.kind, c.ranks) == (kind, ranks)]
        total, sent = sum(c.bytes for c in same), sum(map(sent_bytes, same))
        collectives.append({"kind": kind, "ranks": ranks, "calls": calls, "bytes": total, "sent": round(sent)})
        print(f"{kind:<32}{ranks:>8,}{calls:>8,}{total / 1e9:>12.4f}{sent / 1e9:>12.4f}")
    memory = {name: getattr(counts, name) for name in ("parameters", "gradients", "optimizer", "rest", "peak")}
    figures = {"processes": processes, "shards": shards, "memory": memory, "collectives": collectives}
    figures["formula_peak"] = None if formula is None else round(sum(formula))
    print("\n" + json.dumps(figures))
    return figures


def memory_lines(counts: StepCounts, formula: tuple[float, float] | None) -> list[tuple[str, tuple[int, float | None]]]:
    """Names, counted bytes and bytes by the formula."""
    by_formula = (None, None) if formula is None else formula
    weights = counts.parameters + counts.gradients + counts.optimizer
    return [
        ("parameters", (counts.parameters, counts.parameters)),
        ("gradients", (counts.gradients, None)),
        ("optimizer state", (counts.optimizer, None)),
        ("all three, gathered or copied weights", (weights, by_formula[0])),
        ("activations and the rest", (counts.rest, by_formula[1])),
        ("peak", (counts.peak, None if formula is None else sum(formula))),
    ]
