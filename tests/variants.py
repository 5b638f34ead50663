"""Tiny encoders for every allowed combination of settings, and packed rows of noise as their input."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

from bestrq.model.batch_norm import MaskedBatchNorm
from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.model.settings import StageSettings
from common.segments import Segments

MELS = 4
TINY = {
    "num_mels": MELS, "dim": 8, "num_layers": 1, "num_heads": 2, "feedforward_dim": 6, "kernel_size": 7,
    "subsampling_channels": 4, "relative_buckets": 8, "relative_max_distance": 12,
}  # fmt: skip
CHOICES: dict[str, dict[str, dict[str, Any]]] = {
    "backend": {"segments": {}, "dense": {}, "bands": {}},
    "position": {name: {"position": name} for name in ("rotary", "relative", "fourier", "none")},
    "mask": {
        "segment": {"mask": "segment"},
        "window": {"mask": "window", "window": 6},
        "causal": {"mask": "causal"},
        "chunk": {"mask": "chunk", "chunk_size": 6, "left_chunks": 1},
    },
    "convolution_norm": {name: {"convolution_norm": name} for name in ("layer_norm", "rms_norm", "batch_norm")},
    "subsampling": {
        f"{name} {stride}": {"subsampling": name, "subsampling_factor": stride}
        for name, stride in (("convolutional", 4), ("striding", 2), ("striding", 4), ("striding", 8), ("stacking", 4))
    },
    "heads": {"all": {}, "shared": {"num_kv_heads": 1}},
    "norm": {name: {"norm": name} for name in ("layer_norm", "rms_norm")},
    "feedforward": {name: {"feedforward": name} for name in ("silu", "swiglu")},
    "convolution": {"centred": {}, "causal": {"causal_convolution": True}},
    "stages": {
        "one": {},
        "grouped": {"group_size": 3},
        "two": {"earlier_stages": [StageSettings(1, 4, 2, 6, group_size=3)]},
    },
}
"""option -> name of a value -> settings"""

Case = dict[str, str]
"""option -> name of its value"""


def allowed(case: Case) -> bool:
    """Return True if the values of a case, complete or not, may be combined."""
    unbounded = case.get("mask") in ("segment", "causal")
    groups = case.get("stages", "one") != "one"
    return not (case.get("backend") == "bands" and unbounded) and not (case.get("mask") == "causal" and groups)


def all_cases(*choices: str) -> Iterator[Case]:
    """All allowed combinations of the values of these options."""
    for values in product(*(CHOICES[choice] for choice in choices)):
        case = dict(zip(choices, values, strict=True))
        if allowed(case):
            yield case


def covering_cases(strength: int) -> list[Case]:
    """Cases that cover every allowed combination of values of any `strength` options (greedy, deterministic)."""
    uncovered = {
        tuple(case.items()): None for choices in combinations(CHOICES, strength) for case in all_cases(*choices)
    }  # a dict, as an ordered set
    cases = []
    while uncovered:
        case = dict(next(iter(uncovered)))
        for choice in CHOICES:
            if choice in case:
                continue
            candidates = [candidate for value in CHOICES[choice] if allowed(candidate := {**case, choice: value})]
            case = max(candidates, key=lambda c: sum(part in uncovered for part in _combinations(c, strength, choice)))
        case = {choice: case[choice] for choice in CHOICES}
        for part in _combinations(case, strength):
            uncovered.pop(part, None)
        cases.append(case)
    return cases


def _combinations(case: Case, strength: int, choice: str | None = None) -> Iterator[tuple[tuple[str, str], ...]]:
    """Combinations of `strength` values of a case, in the order of `CHOICES`; with a `choice`, only those with it."""
    for choices in combinations([name for name in CHOICES if name in case], strength):
        if choice is None or choice in choices:
            yield tuple((name, case[name]) for name in choices)


def make_encoder(case: Case, **changes: object) -> ConformerEncoder:
    """Build a float64 encoder in evaluation mode. No parameter is 0 or 1, so that leaks through biases are visible."""
    settings: dict[str, Any] = dict(TINY)
    for choice, value in case.items():
        settings.update(CHOICES[choice][value])
    torch.manual_seed(3)
    encoder = ConformerEncoder(EncoderSettings(**{**settings, **changes})).double().eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    for module in encoder.modules():
        if isinstance(module, MaskedBatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return encoder


@dataclass
class Segment:
    """Position of an utterance or of noise, in mel frames."""

    row: int
    start: int
    length: int
    utterance: int | None
    """number of the utterance; None for noise"""


@dataclass
class Result:
    """Outputs and gradients of a loss on the frames of the utterances."""

    outputs: list[Tensor]
    """[T, D] of each utterance"""
    input_grads: list[Tensor]
    """[F, M] of each utterance"""
    parameter_grads: list[Tensor]
    """summed over the utterances"""
    outside_grad: float
    """largest input gradient outside the utterances"""


def utterance(number: int, length: int) -> Tensor:
    return torch.randn(length, MELS, dtype=torch.float64, generator=torch.Generator().manual_seed(number))


def encode(
    encoder: ConformerEncoder, backend: str, segments: list[Segment], rows: int, frames: int, grads: bool = True
) -> Result:
    """Encode rows with the given segments. All other frames are loud noise, drawn again in every call.

    Slots are in the given order, with an unused one after each.
    """
    log_mel = 5 * torch.randn(rows, frames, MELS, dtype=torch.float64)
    slots: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
    utterances = sorted((s for s in segments if s.utterance is not None), key=lambda s: s.utterance or 0)
    for segment in segments:
        if segment.utterance is not None:
            inside = slice(segment.start, segment.start + segment.length)
            log_mel[segment.row, inside] = utterance(segment.utterance, segment.length)
        slots[segment.row] += [(segment.start, segment.length), (0, 0)]
    width = max(1, *(len(row) for row in slots))
    table = torch.tensor([row + [(0, 0)] * (width - len(row)) for row in slots])
    layout = encoder.layout(Segments(table[..., 0], table[..., 1], frames), backend)
    with torch.set_grad_enabled(grads):
        outputs = encoder(log_mel.requires_grad_(grads), layout)
    stride = encoder.settings.stride
    utterance_outputs = [
        outputs[s.row, s.start // stride : s.start // stride + -(-s.length // stride)] for s in utterances
    ]
    result = Result([output.detach() for output in utterance_outputs], [], [], 0.0)
    if grads:
        loss = torch.zeros((), dtype=torch.float64)
        for segment, output in zip(utterances, utterance_outputs, strict=True):
            generator = torch.Generator().manual_seed(100 + (segment.utterance or 0))
            loss = loss + (output * torch.randn(output.shape, dtype=torch.float64, generator=generator)).sum()
        grad, *result.parameter_grads = torch.autograd.grad(loss, [log_mel, *encoder.parameters()])
        for s in utterances:
            result.input_grads.append(grad[s.row, s.start : s.start + s.length].clone())
            grad[s.row, s.start : s.start + s.length] = 0
        result.outside_grad = float(grad.abs().max())
    return result
