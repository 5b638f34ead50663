"""Compiled blocks: outputs and gradients of eager blocks, one compilation for batches of any layout.

Dynamo's backend 'aot_eager' traces forward and backward graphs and runs them by torch's operators, in seconds; only one
test generates code.
"""

import copy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as torch_flex

from bestrq.model.activation_checkpointing import MODES
from bestrq.model.compilation import compile_blocks
from bestrq.model.conformer import ConformerEncoder
from bestrq.model.settings import CheckpointingMode, EncoderSettings, StageSettings
from bestrq.training.process import DistributedSettings, World, autocast, parallelise
from common.segments import Segments
from tests.gloo import run_distributed

TINY = EncoderSettings(
    num_mels=16, dim=32, num_layers=3, num_heads=2, feedforward_dim=48, kernel_size=7, subsampling_channels=4,
    dropout=0.0, attention_dropout=0.0, compile=True,
)  # fmt: skip
VARIANTS: dict[str, tuple[CheckpointingMode, dict[str, Any]]] = {
    "plain": ("none", {}),
    "relative positions, grouped queries, full": (
        "full", {"position": "relative", "num_kv_heads": 1, "feedforward": "swiglu", "norm": "rms_norm"},
    ),
    "window, causal convolution, selective": (
        "selective", {"mask": "window", "window": 8, "causal_convolution": True},
    ),
    "two stages": (
        "none",
        {"earlier_stages": [StageSettings(num_layers=2, dim=24, num_heads=2, feedforward_dim=32, group_size=2)]},
    ),
}  # fmt: skip
FRAMES = 192


@pytest.fixture(autouse=True)
def new_dynamo() -> Iterator[None]:
    """Dynamo without compiled functions; its counters and the settings of `compile_blocks` are restored."""
    before = torch._dynamo.config.optimize_ddp
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.config.optimize_ddp = before
    torch._dynamo.reset()


def draw_segments(seed: int, rows: int = 2, slots: int = 4) -> Segments:
    """Rows of one to `slots` segments of random lengths, with random gaps."""
    generator = torch.Generator().manual_seed(seed)
    start, length = torch.zeros(2, rows, slots, dtype=torch.int64)
    for row in range(rows):
        count = int(torch.randint(1, slots + 1, (), generator=generator))
        place = FRAMES // count // 16 * 16
        for slot in range(count):
            start[row, slot] = slot * place
            length[row, slot] = int(torch.randint(9, place - 8, (), generator=generator))
    return Segments(start, length, FRAMES)


def encoders(settings: EncoderSettings, backend: Any = "aot_eager") -> tuple[ConformerEncoder, ConformerEncoder]:
    """The same encoder twice, uncompiled and compiled, with positions that have a bias."""
    torch.manual_seed(0)
    eager = ConformerEncoder(settings).train()
    with torch.no_grad():
        for name, parameter in eager.named_parameters():
            if "relative_bias" in name:
                parameter.normal_()
    compiled = copy.deepcopy(eager)
    compile_blocks(compiled.blocks, settings.activation_checkpointing, backend)
    return eager, compiled


def encode(encoder: ConformerEncoder, seed: int = 0, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    log_mel = torch.randn(2, FRAMES, encoder.settings.num_mels, generator=generator)
    segments = draw_segments(seed)
    torch.manual_seed(seed)
    return encoder(log_mel.to(next(encoder.parameters()).dtype), encoder.layout(segments), **options)


def graphs() -> int:
    """Graphs compiled since the start of the test."""
    return int(counters["stats"]["unique_graphs"])


def compare(eager: ConformerEncoder, compiled: ConformerEncoder, tolerance: float, seed: int = 0) -> None:
    outputs = [encode(encoder, seed) for encoder in (eager, compiled)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=tolerance, atol=tolerance)
    for encoder, output in zip((eager, compiled), outputs, strict=True):
        encoder.zero_grad()
        output[..., ::3].square().sum().backward()
    for (name, actual), expected in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        assert actual.grad is not None and expected.grad is not None, name
        scale = float(expected.grad.abs().max())
        torch.testing.assert_close(actual.grad, expected.grad, rtol=tolerance, atol=tolerance * (scale + 1e-3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_blocks_equal_eager_blocks(variant: str) -> None:
    mode, changes = VARIANTS[variant]
    eager, compiled = encoders(replace(TINY, activation_checkpointing=mode, **changes))
    assert eager.layout(draw_segments(0)).output.attention.backend in ("dense", "bands")
    for seed in range(2):
        compare(eager, compiled, 2e-5, seed)
    stages = len(eager.settings.stages)
    # One graph per stage; the block that halves the frame rate is another one.
    assert graphs() == 2 * stages - 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor's code for a CPU needs g++")
def test_generated_code_equals_eager_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    compare(*encoders(replace(TINY, num_layers=1, activation_checkpointing="full"), "inductor"), 1e-4)


@pytest.mark.parametrize("changes", [{}, {"mask": "window", "window": 8}], ids=["dense", "bands"])
@pytest.mark.parametrize("mode", MODES)
def test_no_compilation_after_the_first_batch(mode: CheckpointingMode, changes: dict[str, Any]) -> None:
    """Batches differ in number, places and lengths of the segments."""
    settings = replace(TINY, activation_checkpointing=mode, dropout=0.1, layer_drop=0.2, **changes)
    _, compiled = encoders(settings)
    encode(compiled).sum().backward()
    assert graphs() == 1  # shared by the blocks
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(1, 51):
            encode(compiled, seed).sum().backward()
    assert graphs() == 1
