"""Activation checkpointing: bit-identical gradients, less memory, no unnecessary recomputation."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bestrq.model.activation_checkpointing import MODES, run_block
from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.model.settings import StageSettings
from bestrq.training.process import DistributedSettings, World, autocast, parallelise
from common.segments import Segments
from pipelines.live_bytes import LiveBytes
from tests.gloo import run_distributed

TINY = EncoderSettings(
    num_mels=16, dim=32, num_layers=3, num_heads=2, feedforward_dim=64, kernel_size=7, subsampling_channels=8,
    dropout=0.2, attention_dropout=0.2,
)  # fmt: skip
SAVING = [mode for mode in MODES if mode != "none"]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped queries, swiglu, rms norm, causal": {
        "num_kv_heads": 1, "feedforward": "swiglu", "norm": "rms_norm", "convolution_norm": "rms_norm",
        "causal_convolution": True,
    },
    "relative, window, layer drop": {"position": "relative", "mask": "window", "window": 8, "layer_drop": 0.3},
    "stages, striding": {
        "subsampling": "striding", "subsampling_factor": 8,
        "earlier_stages": [StageSettings(num_layers=2, dim=24, num_heads=2, feedforward_dim=32, group_size=2)],
    },
}  # fmt: skip


def make(settings: EncoderSettings, mode: str, dtype: torch.dtype = torch.float64) -> ConformerEncoder:
    torch.manual_seed(0)
    return ConformerEncoder(dataclasses.replace(settings, activation_checkpointing=mode)).to(dtype)


def compute_loss(model: nn.Module, encoder: ConformerEncoder, seed: int = 1) -> Tensor:
    """Loss on two rows with three segments and a gap; noise and dropout are determined by the seed."""
    torch.manual_seed(seed)
    frames = 192
    layout = encoder.layout(Segments(torch.tensor([[0, 96], [0, 0]]), torch.tensor([[71, 64], [131, 0]]), frames))
    log_mel = torch.randn(2, frames, encoder.settings.num_mels, dtype=next(encoder.parameters()).dtype)
    return model(log_mel, layout).double().pow(2).sum()


def gradients(encoder: ConformerEncoder) -> list[Tensor]:
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in encoder.parameters()]


def equal(actual: list[Tensor], expected: list[Tensor]) -> bool:
    assert any(t.any() for t in expected)
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("mode", SAVING)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_bit_identical_to_those_without_checkpointing(variant: str, mode: str) -> None:
    results = []
    for setting in ("none", mode):
        encoder = make(dataclasses.replace(TINY, **VARIANTS[variant]), setting)
        compute_loss(encoder, encoder).backward()
        results.append(gradients(encoder))
    assert equal(results[1], results[0])


@pytest.mark.parametrize("mode", SAVING)
def test_gradients_are_bit_identical_under_autocast_for_two_batches_in_one_context(mode: str) -> None:
    """Autocast's cache of weights is filled in the second forward pass, but empty in the backward pass."""
    results = []
    for setting in ("none", mode):
        encoder = make(TINY, setting, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            compute_loss(encoder, encoder).backward()
            loss = compute_loss(encoder, encoder, 2)
        loss.backward()
        results.append(gradients(encoder))
    assert equal(results[1], results[0])


def parallel_gradients(world: World, strategy: str) -> dict[tuple[str, str], list[Tensor]]:
    """Gradients of each precision and mode after two steps."""
    gradients_of_mode = {}
    for precision in ("float32", "bfloat16"):
        settings = DistributedSettings(strategy=strategy, device="cpu", precision=precision)  # type: ignore[arg-type]
        for mode in MODES:
            encoder = make(TINY, mode, torch.float32)
            model = parallelise(encoder, encoder.blocks, world, settings)
            for step in range(2):  # in the second step the weights are sharded again
                with autocast(world, settings):
                    loss = compute_loss(model, encoder, 10 * step + world.rank)
                loss.backward()
            grads: list[Any] = [p.grad for p in model.parameters()]
            gradients_of_mode[precision, mode] = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
    return gradients_of_mode


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gradients_of_two_processes_are_the_same_in_every_mode(strategy: str) -> None:
    for result in run_distributed(parallel_gradients, 2, strategy):
        for precision in ("float32", "bfloat16"):
            assert all(equal(result[precision, mode], result[precision, "none"]) for mode in SAVING)


class CountOperations(TorchDispatchMode):
    """Count calls of the operations with a given name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.count = name, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ == self.name
        return func(*args, **(kwargs or {}))


def test_selective_computes_products_with_weights_once_and_full_twice() -> None:
    linear_maps = sum(isinstance(m, nn.Linear) for m in make(TINY, "none").blocks.modules())
    counts = {}
    for mode in MODES:
        encoder = make(TINY, mode)
        with CountOperations("addmm") as counter:
            compute_loss(encoder, encoder).backward()
        counts[mode] = counter.count
    assert counts["selective"] == counts["none"]
    # Except the last one of a block: its output is not needed, so the recomputation ends before it.
    assert counts["full"] == counts["none"] + linear_maps


def kept_bytes(mode: str, frames: int) -> int:
    """Bytes that a block of 32 float32 features stores for a row of one segment, except its output."""
    encoder = make(TINY, "none", torch.float32)
    layout = encoder.layout(Segments(torch.tensor([[0]]), torch.tensor([[4 * frames]]), 4 * frames))
    x = torch.randn(1, frames, TINY.dim, requires_grad=True)
    with LiveBytes() as live:
        y = run_block(encoder.blocks[0], mode, x, layout.stages[0])
    return live.now - y.nbytes


def test_full_stores_the_input_and_selective_an_amount_linear_in_the_length() -> None:
    none, selective = (kept_bytes(mode, 400) for mode in ("none", "selective"))
    assert kept_bytes("full", 400) < 200  # the input is not counted, unlike a seed or similar
    assert 0 < selective < 0.5 * none
    assert kept_bytes("selective", 800) <= 2 * selective < 0.6 * kept_bytes("none", 800)


@pytest.mark.parametrize("mode", MODES)
def test_without_gradients_the_block_is_called_directly(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("bestrq.model.activation_checkpointing.checkpoint")
    with torch.no_grad():
        assert kept_bytes(mode, 100) == 0


def test_an_unknown_mode_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'some': give one of 'none', 'selective', 'full'"):
        run_block(nn.Identity(), "some", torch.zeros(1))
